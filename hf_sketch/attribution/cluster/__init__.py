"""Attribution in independent tasks, for engines that spread them over machines."""
