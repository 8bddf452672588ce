"""How the tests quantise stories260K: all in one way, so that it is compiled once for all of them."""

QUICK = (
    "[weights]\ngroup_size = 32\nternary.rounds = 1\n[rotation]\nsteps = 5\n[activations]\nclip_tokens = 64\n"
)
