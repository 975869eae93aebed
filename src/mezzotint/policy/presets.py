"""The named policies, spelled in the policy grammar."""

PRESETS: dict[str, str] = {
    "float32": "compute=float32",
    "bf16-mixed": "compute=bfloat16",
    "fp16-mixed": "compute=float16, scaling=dynamic",
    "bf16-master": "params=bfloat16, compute=bfloat16, update=master",
    "bf16-stochastic": "params=bfloat16, compute=bfloat16, update=stochastic",
    "bf16-kahan": "params=bfloat16, compute=bfloat16, update=kahan",
    "bf16-pure": "params=bfloat16, compute=bfloat16, reduce=bfloat16, state=bfloat16",
    "bf16-saved": "compute=float32, saved=bfloat16",
    "fp16-products": "compute=float32, scaling=dynamic, products=float16",
    "fp8-mixed": "compute=bfloat16, products=float8_e4m3fn(gradients=float8_e5m2, scale=tensor, history=16)",
    "fp8-rowwise": "compute=bfloat16, products=float8_e4m3fn(scale=row)",
    "fp8-blockwise": "compute=bfloat16, products=float8_e4m3fn(scale=block)",
    "mxfp8": "compute=bfloat16, products=mxfp8_e4m3",
    "nvfp4": "compute=bfloat16, products=nvfp4(stochastic=true)",
}

# what Lightning and Accelerate call these policies
ALIASES: dict[str, str] = {"bf16": "bf16-mixed", "fp16": "fp16-mixed"}
FOREIGN: dict[str, str] = {
    "16-mixed": "fp16-mixed",
    "16": "fp16-mixed",
    "bf16-true": "bf16-stochastic",
    "16-true": "fp16-mixed",
    "32": "float32",
    "32-true": "float32",
    "fp32": "float32",
}

PRESET_NOTES: dict[str, str] = {
    "float32": "everything in float32; the control of every comparison",
    "bf16-mixed": "autocast to bfloat16 over float32 weights; needs no loss scaling",
    "fp16-mixed": "autocast to float16 over float32 weights; needs dynamic loss scaling",
    "bf16-master": "bfloat16 weights in the model, float32 master copies in the optimizer",
    "bf16-stochastic": "bfloat16 weights only, rounded at random so that small updates count on average",
    "bf16-kahan": "bfloat16 weights with a bfloat16 compensation that keeps what rounding dropped",
    "bf16-pure": "bfloat16 weights, gradients and states as plain torch does it; small updates are lost",
    "bf16-saved": "float32 arithmetic; what waits for backward is kept in bfloat16, for users who want memory only",
    "fp16-products": "float32, with the inputs of linear layers rounded to float16: a rehearsal of float16 anywhere",
    "fp8-mixed": "bf16-mixed, and linear layers multiply E4M3 forward and E5M2 gradients under delayed scales",
    "fp8-rowwise": "bf16-mixed, and linear layers multiply E4M3 with a scale for each row and column",
    "fp8-blockwise": "bf16-mixed, and linear layers multiply E4M3 with scales of 1x128 and 128x128 blocks",
    "mxfp8": "bf16-mixed, and linear layers multiply MXFP8 (E4M3 in blocks of 32)",
    "nvfp4": "bf16-mixed, and linear layers multiply NVFP4, gradients rounded at random",
}
