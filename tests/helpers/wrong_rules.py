"""Rules that are wrong on purpose."""

from unittest.mock import patch

from hf_sketch.examples.rules.linear import Linear


def wrong_first_factors():
    """Within, the rule of linear layers doubles the gradients of LoRA's first factor.

    The model's first weights do not show it: they are zero.
    """
    right = Linear.backward

    def doubled(rule, saved, gradient):
        factor = 2 if "lora_A" in rule.path else 1
        yield from right(rule, saved, factor * gradient)

    return patch.object(Linear, "backward", doubled)
