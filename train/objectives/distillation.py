"""Distillation of a teacher's distributions, token by token. What a teacher wrote is learned like any text: see
`train/synthesis/best_of.py`.

All [..., V] logits are of one vocabulary. Losses are per token, to be weighed by `train.objectives.aggregate.token_weights`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    impossible = jnp.isneginf(log_p)
    return jnp.sum(jnp.where(impossible, 0, jnp.exp(log_p) * (jnp.where(impossible, 0, log_p) - log_q)), axis=-1)


def forward_kl_losses(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher, student) [...] at a temperature, times its square so that gradients keep their size (arXiv:1503.02531).

    The student must cover all that the teacher does; on the teacher's texts.
    """
    teacher = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits / temperature))
    return temperature**2 * _kl(teacher, jax.nn.log_softmax(student_logits / temperature))


def reverse_kl_losses(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(student, teacher) [...]: the student may drop what it cannot do; on its own samples (arXiv:2306.08543, 2306.13649).

    A token that the teacher rules out (-inf) and the student does not makes it infinite.
    """
    teacher = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits / temperature))
    return temperature**2 * _kl(jax.nn.log_softmax(student_logits / temperature), teacher)
