"""SwiftKV (arXiv 2410.03960) on the planner's shapes: late layers whose keys and values come from an earlier layer.

A prompt runs through the layers before the cut and the late layers' key and value products; the rest of the late
layers runs over decoded tokens and the last token of each chunk. With a group above 1 (AcrossKV) one late layer's cache
serves the group.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_suite.planner.models.shapes import Layer, Linear, Model, ModelError


def with_swiftkv(model: Model, cut: int, group: int = 1) -> Model:
    """The SwiftKV form of a model: `cut` layers run over the whole prompt.

    Raises:
        ModelError: a cut or group that does not fit, or layers that are not grouped-query.
    """
    count = len(model.layers)
    if not 0 < cut < count:
        raise ModelError(f"SwiftKV: the cut lies between 1 and {count - 1}, not {cut}")
    if group < 1 or (count - cut) % group:
        raise ModelError(f"SwiftKV: group {group} does not divide the {count - cut} layers after the cut")
    made: dict[tuple[int, bool], Layer] = {}
    late = []
    for index in range(cut, count):
        layer, leads = model.layers[index], (index - cut) % group == 0
        key = (id(layer), leads)
        if key not in made:
            made[key] = _late(layer, leads)
        late.append(made[key])
    # The output of the layers before the cut is normed once more.
    return replace(model, layers=(*model.layers[:cut], *late), outside=model.outside + model.hidden)


def prefill_only(model: Model) -> Model:
    """What a prefill-only worker holds of a SwiftKV model: no late layer but its key and value products.

    Raises:
        ModelError: not a SwiftKV model.
    """
    if not any(layer.late for layer in model.layers):
        raise ModelError("only a SwiftKV model has prefill-only workers")
    made: dict[int, Layer] = {}
    layers = []
    for layer in model.layers:
        if not layer.late:
            layers.append(layer)
            continue
        if id(layer) not in made:
            kept = tuple(linear for linear in layer.linears if linear.name == "kv_proj")
            attention = replace(layer.attention, heads=0) if kept and layer.attention else None
            small = attention.key if attention and attention.normed else 0
            made[id(layer)] = Layer(kept, attention, small)
        layers.append(made[id(layer)])
    return replace(model, layers=tuple(layers), head=False, outside=model.outside - model.hidden)


def _late(layer: Layer, leads: bool) -> Layer:
    attention = layer.attention
    fused = next((linear for linear in layer.linears if linear.name == "qkv_proj"), None)
    if attention is None or fused is None:
        raise ModelError("SwiftKV: only grouped-query attention has this form")
    queries = replace(fused, name="q_proj", outputs=fused.outputs - fused.kv_outputs, kv_outputs=0, rows="sampled")
    linears: list[Linear] = [queries]
    if leads:
        linears.append(replace(fused, name="kv_proj", outputs=fused.kv_outputs, rows="tokens"))
    linears += [replace(linear, rows="sampled") for linear in layer.linears if linear is not fused]
    # Followers have no norm of keys of their own.
    small = layer.small - (attention.key if attention.normed and not leads else 0)
    attention = replace(attention, rows="sampled", kv_values=attention.kv_values if leads else 0)
    return Layer(tuple(linears), attention, small, layer.moe)
