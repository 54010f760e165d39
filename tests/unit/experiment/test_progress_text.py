"""What a display says of a step."""

from moebench.experiment.display import format_progress


def test_collapsed_layers_are_counted() -> None:
    message = {"step": 3, "loss": 1.23456, "tokens_per_s": 12345.6}
    assert format_progress(message) == "loss 1.235  12,346 tokens/s"
    assert format_progress({**message, "num_collapsed": 0}) == "loss 1.235  12,346 tokens/s"
    assert format_progress({**message, "num_collapsed": 2}) == "loss 1.235  12,346 tokens/s  2 layers collapsed"
