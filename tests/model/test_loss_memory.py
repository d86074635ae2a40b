"""The memory of the chunked loss at the sizes of a real model, as the compiler lays it out; nothing is run."""

from benchmarks.loss_memory import FULL, compiled_bytes


def test_the_chunked_loss_needs_less_than_a_quarter_of_the_plain_one():
    vocab_size, rows, length, width = FULL
    assert (vocab_size, rows * length) == (131_072, 8192)
    plain = compiled_bytes("plain", *FULL)
    assert plain > 4 * vocab_size * rows * length  # sees the float32 logits at all
    chunked = compiled_bytes("chunked", *FULL)
    assert chunked > 4 * vocab_size * width  # and the gradient of the head
    assert chunked < plain / 4
