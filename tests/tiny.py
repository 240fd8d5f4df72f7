"""A tiny random model of each model module of mlx-lm; configurations are like those of mlx-lm's own tests."""

import importlib
import json
import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten

CONFIGS = json.loads((Path(__file__).parent / "model_configs.json").read_text())
HELPERS = {"activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline"}
HELPERS |= {"__init__", "rope_utils", "ssm", "switch_layers"}


def modules():
    """The names of the installed mlx-lm's model modules."""
    files = Path(mlx_lm.models.__file__).parent.glob("*.py")
    return sorted({file.stem for file in files} - HELPERS)


def make_tiny(name, seed=0, **changes):
    """A float32 model whose outputs vary."""
    _stand_in(name)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({**json.loads(json.dumps(CONFIGS[name])), **changes}))
    weights = [(path, _varied(name, path, value)) for path, value in tree_flatten(model.parameters())]
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


def _varied(name, path, value):
    if not mx.issubdtype(value.dtype, mx.floating):
        if name == "bitnet" and value.dtype == mx.uint8:  # four weights of -1, 0 and 1 in each
            parts = mx.random.randint(0, 3, (4, *value.shape)).astype(mx.uint8)
            return parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)
        return value
    value = value.astype(mx.float32)
    if "scales" in path or "signs" in path:
        return value
    if value.ndim < 2:
        return value + 0.1 * mx.random.normal(value.shape)
    inputs = int(np.prod(value.shape[1:])) if "conv" in path else value.shape[-1]
    return value + mx.random.normal(value.shape) / max(inputs, 1) ** 0.5


def _stand_in(name):
    """Let modules run that want another package, or kernels that exist on Metal only."""
    if name == "olmo":
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    if name == "bitnet":
        from mlx_lm.models.bitlinear_layers import BitLinear

        BitLinear.execute_matmul_kernel = _ternary_product
    if name == "muse_spark":
        from mlx_lm import kernels

        for function in (
            qk_norm,
            qk_norm_rope,
            pre_norm,
            norm_add_norm,
            expert_routing,
            post_expert_norm_combine,
            rms_norm_sigmoid_gate,
        ):
            setattr(kernels, function.__name__, function)
        path = Path(mlx_lm.models.__file__).parent / "muse_spark.py"
        module = types.ModuleType("mlx_lm.models.muse_spark")
        module.__package__, module.__file__ = "mlx_lm.models", str(path)
        sys.modules["mlx_lm.models.muse_spark"] = module
        code = path.read_text().replace("mx.bfloat16", "mx.float32")  # so that outputs can be compared
        exec(compile(code, path, "exec"), module.__dict__)


def _ternary_product(self, x, packed):
    parts = [((packed >> (2 * i)) & 3).astype(mx.float32) - 1 for i in range(4)]
    weight = mx.concatenate(parts)[: self.out_features]
    return (x @ weight.T) / self.in_features**0.5


# muse_spark's kernels, in MLX's operations.


def _norm(x, eps):
    return mx.fast.rms_norm(x, None, eps)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    shape, split = (*qkvg.shape[:2], -1, head_dim), n_heads * head_dim
    keys = _norm(qkvg[..., split : split + n_kv_heads * head_dim].reshape(shape), eps)
    return _norm(qkvg[..., :split].reshape(shape), eps) * query_scale, keys


def qk_norm_rope(qkvg, *, rope_base, offset, **options):
    if isinstance(offset, mx.array):  # as the kernel: one offset per batch row, the first ones of more
        offset = offset.reshape(-1)[: qkvg.shape[0]]

    def rotated(x):
        x = x.transpose(0, 2, 1, 3)
        x = mx.fast.rope(x, options["head_dim"], traditional=True, base=rope_base, scale=1.0, offset=offset)
        return x.transpose(0, 2, 1, 3)

    return tuple(map(rotated, qk_norm(qkvg, **options)))


def pre_norm(stream, norm, *, dtype):
    return norm(stream).astype(dtype)


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    value = branch if post_weight is None else branch * post_weight
    out = alpha * stream + beta * _norm(value, post_eps)
    return out, (None if next_norm is None else next_norm(out))


def expert_routing(logits, bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    index = mx.argpartition(-(scores + bias), top_k - 1, axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, index, axis=-1)
    return index.astype(mx.uint32), route_scale * weights / (weights.sum(-1, keepdims=True) + score_eps)


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    return (_norm(experts * norm_weight, eps) * weights[..., None]).sum(-2)


def rms_norm_sigmoid_gate(x, gate, *, eps):
    batch, heads, length, size = x.shape
    x = _norm(x, eps).transpose(0, 2, 1, 3)
    return x.reshape(batch, length, heads * size) * mx.sigmoid(gate)
