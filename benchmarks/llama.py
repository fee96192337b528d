"""llama.cpp's BERT, through llama-cpp-python: models as GGUF files, and batches without padding."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_TOKENS, MOST_SEQUENCES = 2048, 64  # of a call; every token meets every other, and is then masked
_EMBEDDINGS = {
    "word_embeddings.weight": "token_embd.weight",
    "token_type_embeddings.weight": "token_types.weight",
    "position_embeddings.weight": "position_embd.weight",
    "LayerNorm.weight": "token_embd_norm.weight",
    "LayerNorm.bias": "token_embd_norm.bias",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_WHOLE = ("token_types.weight", "position_embd.weight")  # and all vectors: float32 whatever the type


def write(model: Any, path: Path) -> None:
    """Write a BERT or RoBERTa as GGUF; the file's stem says the type of its matrices, such as ``Q8_0``.

    Raises:
        ValueError: for another family.
    """
    import gguf

    config, base = model.config, model.base_model
    if config.model_type not in ("bert", "roberta"):
        raise ValueError(f"llama.cpp is given BERT and RoBERTa only, not {config.model_type}")
    writer = gguf.GGUFWriter(path, "bert")
    tensors = dict(_tensors(model))
    positions = len(tensors["position_embd.weight"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_tokenizer_model("none")
    writer.add_token_type_count(config.type_vocab_size)
    if model is base:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    else:
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels([f"label {number}" for number in range(config.num_labels)])
    wanted = gguf.GGMLQuantizationType[path.stem]
    for name, tensor in tensors.items():
        array = tensor.detach().float().numpy()
        kind = gguf.GGMLQuantizationType.F32 if array.ndim == 1 or name in _WHOLE else wanted
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    config, base = model.config, model.base_model
    weights = dict(base.embeddings.named_parameters())
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # RoBERTa counts positions from there
    for name, theirs in _EMBEDDINGS.items():
        yield theirs, weights[name][first:] if theirs == "position_embd.weight" else weights[name]
    for number, layer in enumerate(base.encoder.layer):
        for name, theirs in _LAYER.items():
            for kind, weight in layer.get_submodule(name).named_parameters():
                yield f"blk.{number}.{theirs}.{kind}", weight
    if model is not base:
        roberta = config.model_type == "roberta"
        head = model.classifier
        dense, last = (head.dense, head.out_proj) if roberta else (base.pooler.dense, head)
        for theirs, linear in (("cls", dense), ("cls.output", last)):
            yield f"{theirs}.weight", linear.weight
            yield f"{theirs}.bias", linear.bias


def build(path: Path, threads: int, *, pooled: bool, flash: bool) -> Callable[[dict[str, Tensor]], Tensor]:
    """The engine of a file, from a padded batch to logits or vectors."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp cannot load its model")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = MOST_TOKENS
    params.n_seq_max, params.kv_unified = MOST_SEQUENCES, True
    params.n_threads = params.n_threads_batch = threads
    params.embeddings = True
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    width = llama_cpp.llama_model_n_embd(model) if pooled else llama_cpp.llama_model_n_cls_out(model)
    batch = llama_cpp.llama_batch_init(MOST_TOKENS, 0, 1)
    tokens, positions, counts = (
        np.ctypeslib.as_array(field, (MOST_TOKENS,)) for field in (batch.token, batch.pos, batch.n_seq_id)
    )
    numbers = np.zeros(MOST_TOKENS, np.int32)
    address, step = numbers.ctypes.data, numbers.itemsize
    one = ctypes.POINTER(ctypes.c_int32)
    batch.seq_id = (one * MOST_TOKENS)(*(ctypes.cast(address + place * step, one) for place in range(MOST_TOKENS)))
    counts[:] = 1
    np.ctypeslib.as_array(batch.logits, (MOST_TOKENS,))[:] = 1

    def run(sequences: list[np.ndarray]) -> list[np.ndarray]:
        place = 0
        for number, ids in enumerate(sequences):
            where = slice(place, place + len(ids))
            tokens[where], positions[where], numbers[where] = ids, np.arange(len(ids)), number
            place += len(ids)
        batch.n_tokens = place
        if llama_cpp.llama_encode(context, batch):
            raise RuntimeError("llama.cpp cannot run a batch")
        found = (llama_cpp.llama_get_embeddings_seq(context, number) for number in range(len(sequences)))
        return [np.ctypeslib.as_array(vector, (width,)).copy() for vector in found]

    def call(inputs: dict[str, Tensor], keep: object = silent) -> Tensor:  # the callback must live as long
        lengths = inputs["attention_mask"].sum(1).tolist()
        sequences = [ids[:length].numpy() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
        found: list[np.ndarray] = []
        for group in groups(lengths):
            found += run(sequences[group])
        return torch.from_numpy(np.stack(found))

    return call


def groups(lengths: list[int]) -> Iterator[slice]:
    """Sequences in a row that fit a call."""
    first = tokens = 0
    for place, length in enumerate(lengths):
        if place > first and (tokens + length > MOST_TOKENS or place - first == MOST_SEQUENCES):
            yield slice(first, place)
            first, tokens = place, 0
        tokens += length
    yield slice(first, len(lengths))
