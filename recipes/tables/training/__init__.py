"""Tables of what rows say of training itself: its ledger, its noise."""
