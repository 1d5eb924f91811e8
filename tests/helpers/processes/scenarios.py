"""All that tests run in several processes, by name.

`torchrun --nproc_per_node 2 -m tests.helpers.processes.scenarios <dir> ddp/plain`.
"""

from tests.helpers.processes import (
    deepspeed_training,
    distributed_training,
    failing_training,
    failing_trials,
    guarded_training,
    joint_scoring,
    joint_training,
    sharded_models,
    sharded_training,
)
from tests.helpers.processes.launching import run_scenarios

SCENARIOS = {
    **joint_training.SCENARIOS,
    **joint_scoring.SCENARIOS,
    **guarded_training.SCENARIOS,
    **failing_training.SCENARIOS,
    **deepspeed_training.SCENARIOS,
    **distributed_training.SCENARIOS,
    **sharded_models.SCENARIOS,
    **sharded_training.SCENARIOS,  # last: their meshes hold the group for ever
    **failing_trials.SCENARIOS,
}

if __name__ == "__main__":
    run_scenarios(SCENARIOS)
