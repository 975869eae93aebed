"""The named policies, spelled in the policy grammar."""

PRESETS: dict[str, str] = {
    "float32": "compute=float32",
    "bf16-mixed": "compute=bfloat16",
    "fp16-mixed": "compute=float16, scaling=dynamic",
    "bf16-master": "params=bfloat16, compute=bfloat16, update=master",
    "bf16-stochastic": "params=bfloat16, compute=bfloat16, update=stochastic",
    "bf16-kahan": "params=bfloat16, compute=bfloat16, update=kahan",
    "bf16-pure": "params=bfloat16, compute=bfloat16, reduce=bfloat16, state=bfloat16",
}

PRESET_NOTES: dict[str, str] = {
    "float32": "everything in float32; the control of every comparison",
    "bf16-mixed": "autocast to bfloat16 over float32 weights; needs no loss scaling",
    "fp16-mixed": "autocast to float16 over float32 weights; needs dynamic loss scaling",
    "bf16-master": "bfloat16 weights in the model, float32 master copies in the optimizer",
    "bf16-stochastic": "bfloat16 weights only, rounded at random so that small updates count on average",
    "bf16-kahan": "bfloat16 weights with a bfloat16 compensation that keeps what rounding dropped",
    "bf16-pure": "bfloat16 weights, gradients and states as plain torch does it; small updates are lost",
}
