"""Rotary embeddings: theta and scaling, in Megatron's flags and in ``config.json``."""

import math
from collections.abc import Mapping
from typing import Any

from sparsecod_mcore.errors import UserError

# What Megatron's Llama 3 frequency scaling has fixed.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_settings(config: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Megatron's arguments; older files keep theta at the top level and the scaling in ``rope_scaling``."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{name} is {config[name]!r}, not an object")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    settings: dict[str, Any] = {
        "rotary_base": _positive("rope_theta", rope.get("rope_theta") or config.get("rope_theta") or default_theta),
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,  # Megatron's default, without effect
    }
    if kind == "linear":
        settings["rotary_seq_len_interpolation_factor"] = _positive("factor", rope["factor"])
    elif kind == "llama3":
        changed = [name for name, value in _LLAMA3_SCALING.items() if rope.get(name, value) != value]
        if changed:
            raise UserError(
                f"rope scaling 'llama3' with {changed[0]} {rope[changed[0]]} is not supported, "
                f"{_LLAMA3_SCALING[changed[0]]} is"
            )
        settings |= {"use_rope_scaling": True, "rope_scaling_factor": _positive("factor", rope["factor"])}
    elif kind != "default":
        raise UserError(f"rope scaling {kind!r} is not supported, 'default', 'linear' and 'llama3' are")
    return settings


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} of the rotary embedding is {value!r}, not a number above 0")
    return value


def rope_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``config.json``, for readers old and new."""
    theta, stretch = float(settings["rotary_base"]), settings["rotary_seq_len_interpolation_factor"]
    scaling: dict[str, Any] = {"rope_type": "default"}
    if settings["use_rope_scaling"]:
        scaling = {"rope_type": "llama3", "factor": settings["rope_scaling_factor"], **_LLAMA3_SCALING}
    elif stretch is not None:
        scaling = {"rope_type": "linear", "factor": stretch}
    older = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, **scaling}, **older}
