// The library's C interface: what token_pruning/engine/native.py calls. Every function that can fail returns null or a
// negative number and leaves a message for tp_last_error. Pointers are to contiguous float32 or int32 unless they say
// otherwise; nothing is kept of them after a call.
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu_level.h"
#include "encoder.h"

#define TP_EXPORT extern "C" __attribute__((visibility("default")))

using namespace tp;

namespace {

thread_local std::string last_error;

template <class Function>
auto guarded(Function function, decltype(function()) failed) -> decltype(function()) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        last_error = "out of memory";
    } catch (const std::exception& error) {
        last_error = error.what();
    }
    return failed;
}

const Kernels* kernels_at(int level, Dtype dtype) {
    if (level > best_level()) return nullptr;
    switch (level) {
#if defined(TP_X86)
        case AMX:
            return amx_kernels(dtype);
        case AVX512:
            return avx512_kernels(dtype);
        case AVX2:
            return avx2_kernels(dtype);
#endif
        case PORTABLE:
            return portable_kernels(dtype);
    }
    return nullptr;
}

const Kernels& required_kernels(int level, int dtype) {
    const Kernels* kernels = kernels_at(level, (Dtype)dtype);
    if (!kernels) throw std::invalid_argument("this kernel level is not available for this dtype");
    return *kernels;
}

struct Head {
    const Kernels& kernels;
    Slabs memory;
    Linear linear;
};

}  // namespace

TP_EXPORT const char* tp_last_error() { return last_error.c_str(); }

// What Python must agree with: a number that changes with the interface, and the size of the one structure it fills.
TP_EXPORT int tp_abi_version() { return 2; }

TP_EXPORT int tp_request_size() { return (int)sizeof(Request); }

TP_EXPORT int tp_best_level() { return best_level(); }

// The best level, at most `limit`, with kernels for the dtype and the sizes.
TP_EXPORT int tp_choose_level(int limit, int dtype, int hidden, int inner, int head_size) {
    for (int level = limit; level >= PORTABLE; level--) {
        const Kernels* kernels = kernels_at(level, (Dtype)dtype);
        if (kernels && kernels->fits(hidden, inner, head_size)) return level;
    }
    return -1;
}

TP_EXPORT const char* tp_describe(int level, int dtype) {
    const Kernels* kernels = kernels_at(level, (Dtype)dtype);
    return kernels ? kernels->description : "";
}

TP_EXPORT Encoder* tp_encoder_new(int level, int dtype, int layers, int hidden, int heads, int inner, float epsilon,
                                  int activation) {
    return guarded(
        [&] {
            Shape shape{layers, hidden, heads, inner, epsilon, (Activation)activation};
            return new Encoder(required_kernels(level, dtype), shape);
        },
        (Encoder*)nullptr);
}

TP_EXPORT void tp_encoder_free(Encoder* encoder) { delete encoder; }

// which: 0 query, 1 key, 2 value, 3 attention output, 4 feed-forward up, 5 feed-forward down; layer -1: the projection
// of embeddings of another width. weight is [out, in].
TP_EXPORT int tp_encoder_set_linear(Encoder* encoder, int layer, int which, const float* weight, const float* bias,
                                    int in, int out) {
    return guarded(
        [&] {
            Linear linear = pack_linear(encoder->kernels, encoder->memory, weight, bias, in, out);
            if (layer < 0) {
                encoder->embeddings.projection = linear;
            } else {
                Layer& l = encoder->layers.at(layer);
                Linear* places[] = {&l.query, &l.key, &l.value, &l.output, &l.up, &l.down};
                *places[which] = linear;
            }
            return 0;
        },
        -1);
}

// which: 0 after attention, 1 after the feed-forward; layer -1: the embeddings'.
TP_EXPORT int tp_encoder_set_norm(Encoder* encoder, int layer, int which, const float* gamma, const float* beta,
                                  int size) {
    return guarded(
        [&] {
            Norm norm{{gamma, gamma + size}, {beta, beta + size}};
            if (layer < 0)
                encoder->embeddings.norm = std::move(norm);
            else
                (which == 0 ? encoder->layers.at(layer).attention_norm : encoder->layers.at(layer).output_norm) =
                    std::move(norm);
            return 0;
        },
        -1);
}

// which: 0 words, 1 positions, 2 token types. values is [rows, size], of bfloat16 if `half`, which all tables must
// share.
TP_EXPORT int tp_encoder_set_table(Encoder* encoder, int which, const void* values, int rows, int size, int half) {
    return guarded(
        [&] {
            Embeddings& e = encoder->embeddings;
            const size_t bytes = (size_t)rows * size * (half ? 2 : 4);
            char* table = encoder->memory.take(bytes);
            __builtin_memcpy(table, values, bytes);
            (which == 0 ? e.word : which == 1 ? e.position : e.type) = table;
            (which == 0 ? e.words : which == 1 ? e.positions : e.types) = rows;
            e.size = size;
            encoder->half_tables = half;
            return 0;
        },
        -1);
}

TP_EXPORT int64_t tp_encoder_weight_bytes(const Encoder* encoder) { return (int64_t)encoder->memory.used(); }

// 0: done; 1: `decide` asked to stop; -1: an error.
TP_EXPORT int tp_encoder_forward(Encoder* encoder, const Request* request) {
    return guarded(
        [&] {
            const Request& r = *request;
            if (r.sequences < 1 || r.cu_seqlens[0] != 0) throw std::invalid_argument("cu_seqlens must begin with 0");
            for (int s = 0; s < r.sequences; s++)
                if (r.cu_seqlens[s + 1] <= r.cu_seqlens[s]) throw std::invalid_argument("cu_seqlens must rise");
            const Embeddings& e = encoder->embeddings;
            for (int i = 0; i < r.cu_seqlens[r.sequences]; i++)
                if (r.ids[i] < 0 || r.ids[i] >= e.words || r.positions[i] < 0 || r.positions[i] >= e.positions ||
                    (r.types && (r.types[i] < 0 || r.types[i] >= e.types)))
                    throw std::invalid_argument("an id, position or token type is outside its table");
            return encoder->forward(r) ? 1 : 0;
        },
        -1);
}

TP_EXPORT Head* tp_linear_new(int level, int dtype, const float* weight, const float* bias, int in, int out) {
    return guarded(
        [&] {
            const Kernels& kernels = required_kernels(level, dtype);
            std::unique_ptr<Head> head(new Head{kernels, Slabs(0), {}});
            head->linear = pack_linear(kernels, head->memory, weight, bias, in, out);
            return head.release();
        },
        (Head*)nullptr);
}

TP_EXPORT void tp_linear_free(Head* head) { delete head; }

// out[rows, out] = x[rows, in] · weightᵀ + bias, both float32.
TP_EXPORT int tp_linear_apply(const Head* head, const float* x, int rows, float* out, int threads) {
    return guarded(
        [&] {
            apply_linear(head->kernels, head->linear, x, rows, out, threads);
            return 0;
        },
        -1);
}
