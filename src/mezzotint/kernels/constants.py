"""What the compiled loops and their twins in torch operations agree on."""

# what a word is: bits of float32, a word of bfloat16 or float16, or a code of a target format
FLOAT32, BFLOAT16, FLOAT16, CODES = 0, 1, 2, 3

# rounding modes
NEAREST, TOWARD_ZERO, STOCHASTIC = 0, 1, 2

# Philox4x32 (Salmon et al. 2011): round multipliers and key increments. 7 rounds pass all of BigCrush by table 2 of the
# paper; the 10 of common use are a margin that rounding does not need.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
COUNTERS = 16  # in a block
BLOCK_WORDS = 4 * COUNTERS
HALVES = 1024  # words that serve twice as many elements, where 16 bits are enough

# places of a range count that are no exponent fields
NAN, INF, ZERO = 256, 257, 258
NUM_COUNTS = 259
