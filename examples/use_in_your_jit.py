"""A quantised model inside your own JAX program: scoring under jit and vmap, and the gradient of a soft prompt.

    twla demo                                     # makes smollm2-w1.58
    python examples/use_in_your_jit.py smollm2-w1.58

The model is a pytree, so it is an argument of your jitted functions like any other array. Its weights stay packed; each
layer is unpacked where it is used.
"""

import sys

import jax
import jax.numpy as jnp
import optax

import twla_jax


def log_likelihood(model, tokens, length):
    """Mean log-probability of the first `length` tokens `[t]` after their first, in nats."""
    log_probs = jax.nn.log_softmax(model(tokens[None])[0, :-1])
    of_next = jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)[:, 0]
    return jnp.where(jnp.arange(1, tokens.shape[0]) < length, of_next, 0).sum() / (length - 1)


@jax.jit
def rank(model, candidates, lengths):
    """Candidates `[n, t]`, padded to one length, from the likeliest to the least likely, and their scores."""
    scores = jax.vmap(log_likelihood, in_axes=(None, 0, 0))(model, candidates, lengths)
    order = jnp.argsort(-scores)
    return order, scores[order]


def soft_prompt_loss(prompt, model, target):
    """Negative log-likelihood of `target [t]` after the vectors `prompt [p, d]`, which no token needs to have."""
    x = jnp.concatenate([prompt[None], model.embed_tokens(target[None])], axis=1)
    context = model.context(x.shape[1])
    x = model.through_blocks(lambda x, block, context, index: block(x, context), x, context)
    logits = model.logits(model.norm(x))[0, len(prompt) - 1 : -1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


@jax.jit
def tune(prompt, model, target):
    """Twenty Adam steps on the soft prompt alone; the loss before each."""
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        prompt, state = carry
        loss, gradient = jax.value_and_grad(soft_prompt_loss)(prompt, model, target)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(prompt, updates), state), loss

    (prompt, _), losses = jax.lax.scan(step, (prompt, optimizer.init(prompt)), length=20)
    return prompt, losses


def main(folder):
    model, tokenizer = twla_jax.load(folder)

    sentences = [
        "Once upon a time there was a girl.",
        "Once upon a time there girl a was.",
        "Time a upon once girl.",
    ]
    encoded = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    longest = max(map(len, encoded))
    candidates = jnp.array([ids + [0] * (longest - len(ids)) for ids in encoded])
    order, scores = rank(model, candidates, jnp.array(list(map(len, encoded))))
    for index, score in zip(order.tolist(), scores.tolist(), strict=True):
        print(f"{score:8.3f} nats a token   {sentences[index]}")

    prompt = model.embed_tokens(candidates[:1, :4])[0]
    _, losses = tune(prompt, model, jnp.array(encoded[-1]))
    print(f"soft prompt: loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-w1.58")
