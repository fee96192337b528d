// The library's C interface: what token_pruning/engine/library.py declares. Every function that can fail returns null
// or a negative number and leaves a message for tp_last_error. Pointers are to contiguous float32 or int32 unless they
// say otherwise; nothing is kept of them after a call.
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu_level.h"
#include "encoder.h"
#include "threads.h"

#define TP_EXPORT extern "C" __attribute__((visibility("default")))

using namespace tp;

namespace {

thread_local char last_error[256];  // writing it allocates nothing

void say(const char* message) { std::snprintf(last_error, sizeof last_error, "%s", message); }

template <class Function>
auto guarded(Function function, decltype(function()) failed) -> decltype(function()) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        say("out of memory");
    } catch (const std::exception& error) {
        say(error.what());
    } catch (...) {
        say("an unknown error");
    }
    return failed;
}

void require(bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
}

const Kernels* kernels_at(int level, Dtype dtype) {
    if (!has_level(level) || dtype < Dtype::float32 || dtype > Dtype::int8) return nullptr;
    switch (level) {
#if defined(TP_X86)
        case AMX:
            return amx_kernels(dtype);
        case AVX512_BF16:
            return avx512_bf16_kernels(dtype);
        case AVX512_VNNI:
            return avx512_vnni_kernels(dtype);
        case AVX512:
            return avx512_kernels(dtype);
        case AVX_VNNI:
            return avx_vnni_kernels(dtype);
        case AVX2:
            return avx2_kernels(dtype);
#elif defined(TP_ARM)
        case I8MM:
            return i8mm_kernels(dtype);
        case DOTPROD:
            return dotprod_kernels(dtype);
        case NEON:
            return neon_kernels(dtype);
#endif
        case PORTABLE:
            return portable_kernels(dtype);
    }
    return nullptr;
}

const Kernels& required_kernels(int level, int dtype) {
    const Kernels* kernels = kernels_at(level, (Dtype)dtype);
    require(kernels, "this kernel level is not available for this dtype");
    return *kernels;
}

const Linear& linear_at(const Encoder& encoder, int layer, int which) {
    require(layer >= -1 && layer < encoder.shape.layers && which >= 0 && which < (layer < 0 ? 1 : 7), "no such matrix");
    if (layer < 0) return encoder.embeddings.projection;
    const Layer& l = encoder.layers[layer];
    const Linear* places[] = {&l.query, &l.key, &l.value, &l.output, &l.up, &l.down, &l.gate};
    return *places[which];
}

// For products of a head's queries and keys, which int8 would spoil: rows of the same exchange type, not quantised.
const Kernels* distance_kernels_at(int level, Dtype dtype) {
    if (dtype == Dtype::int8) dtype = Dtype::bfloat16;
    while (level > PORTABLE && !kernels_at(level, dtype)) level--;
    return kernels_at(level, dtype);
}

const std::vector<Linear>& distance_products_at(const Encoder& encoder, int layer, int which) {
    require(layer >= 0 && layer < encoder.shape.layers && which >= 0 && which < 2, "no such products");
    require(!encoder.distances.columns.empty(), "the columns of distances come first");
    const DistanceProducts& products = encoder.layers[layer].distance;
    return which == 0 ? products.of_queries : products.of_keys;
}

const Norm& norm_at(const Encoder& encoder, int layer, int which) {
    require(layer >= -1 && layer < encoder.shape.layers && which >= 0 && which < (layer < 0 ? 3 : 2), "no such norm");
    const Embeddings& e = encoder.embeddings;
    if (layer < 0) return which == 0 ? e.norm : which == 1 ? encoder.last_norm : e.projected_norm;
    return which == 0 ? encoder.layers[layer].attention_norm : encoder.layers[layer].output_norm;
}

struct Head {
    const Kernels& kernels;
    Slabs memory;
    Linear linear;
};

}  // namespace

TP_EXPORT const char* tp_last_error() { return last_error; }

// What Python must agree with: a number that changes with the interface, and the sizes of the structures it fills.
TP_EXPORT int tp_abi_version() { return 7; }

TP_EXPORT int tp_request_size() { return (int)sizeof(Request); }

TP_EXPORT int tp_shape_size() { return (int)sizeof(Shape); }

// Whether the processor has a level, by its number in cpu_level.h.
TP_EXPORT int tp_has_level(int level) { return has_level(level); }

// Cores that this thread may use now: its affinity mask and the control group's quota.
TP_EXPORT int tp_usable_cores() { return usable_cores(); }

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

TP_EXPORT Encoder* tp_encoder_new(int level, int dtype, const Shape* shape) {
    return guarded(
        [&] {
            const Shape& s = *shape;
            require(s.layers > 0 && s.hidden > 0 && s.heads > 0 && s.key_heads > 0 && s.head_size > 0 && s.inner > 0 &&
                        s.heads % s.key_heads == 0,
                    "sizes must be positive, and the heads a multiple of those of keys");
            require(s.activation >= Activation::gelu && s.activation <= Activation::silu, "no such activation");
            const Kernels& kernels = required_kernels(level, dtype);
            require(kernels.fits(s.hidden, s.inner, s.head_size) && kernels.fits(s.query_size(), s.inner, s.head_size),
                    "this kernel level does not fit these sizes");
            Encoder* encoder = new Encoder(kernels, s);
            encoder->distance_kernels = distance_kernels_at(level, (Dtype)dtype);
            return encoder;
        },
        (Encoder*)nullptr);
}

TP_EXPORT void tp_encoder_free(Encoder* encoder) { delete encoder; }

// which: 0 query, 1 key, 2 value, 3 attention output, 4 feed-forward up, 5 feed-forward down, 6 the gate beside up;
// layer -1: the projection of embeddings. Layers are those that tp_encoder_set_step names. weight is [out, in], bias
// [out] or null; scale [out] is what tp_encoder_get_linear gave for int8, with its weights, else null.
TP_EXPORT int tp_encoder_set_linear(Encoder* encoder, int layer, int which, const float* weight, const float* bias,
                                    const float* scale, int in, int out) {
    return guarded(
        [&] {
            Linear& place = const_cast<Linear&>(linear_at(*encoder, layer, which));
            const Shape& s = encoder->shape;
            const int ins[] = {s.hidden, s.hidden, s.hidden, s.query_size(), s.hidden, s.inner, s.hidden};
            const int outs[] = {s.query_size(), s.key_size(), s.key_size(), s.hidden, s.inner, s.hidden, s.inner};
            require(in > 0 && (layer < 0 ? out == s.hidden : in == ins[which] && out == outs[which]),
                    "a matrix of another size");
            place = pack_linear(encoder->kernels, encoder->memory, weight, bias, scale, in, out);
            return 0;
        },
        -1);
}

// The numbers of a matrix that was set, exactly as they are used: weight [out, in], for int8 whole numbers; bias [out];
// scale [out], written for int8 alone.
TP_EXPORT int tp_encoder_get_linear(const Encoder* encoder, int layer, int which, float* weight, float* bias,
                                    float* scale, int in, int out) {
    return guarded(
        [&] {
            const Linear& linear = linear_at(*encoder, layer, which);
            require(linear.weight && linear.in == in && linear.out == out, "a matrix of another size");
            unpack_linear(encoder->kernels, linear, weight, bias, scale);
            return 0;
        },
        -1);
}

// What a layer, counted in the order they run, has of its own: the number of its weights, for windows the greatest
// distance at which tokens attend to each other, and the number of its rotation; both below 0 for none.
TP_EXPORT int tp_encoder_set_step(Encoder* encoder, int layer, int weights, int window, int rotation) {
    return guarded(
        [&] {
            const int layers = encoder->shape.layers;
            require(layer >= 0 && layer < layers && weights >= 0 && weights < layers, "no such layer");
            encoder->steps[layer] = {weights, window, rotation};
            return 0;
        },
        -1);
}

// frequencies [count], count being half the head size: what positions are multiplied by. Numbers from 0 on, in turn.
TP_EXPORT int tp_encoder_set_rotation(Encoder* encoder, int which, const float* frequencies, int count, float factor) {
    return guarded(
        [&] {
            require(which >= 0 && which <= (int)encoder->rotations.size() && 2 * count == encoder->shape.head_size,
                    "a rotation of another size");
            if (which == (int)encoder->rotations.size()) encoder->rotations.emplace_back();
            encoder->rotations[which] = {{frequencies, frequencies + count}, factor};
            return 0;
        },
        -1);
}

// table [heads, 2 · far + 1]: what every layer adds to a head's logits, for a query's distance from a key from -far to
// far; farther ones count as these.
TP_EXPORT int tp_encoder_set_bias(Encoder* encoder, const float* table, int heads, int far) {
    return guarded(
        [&] {
            require(heads == encoder->shape.heads && far >= 0 && far < 1 << 20, "a bias of another size");
            encoder->set_bias(table, far);
            return 0;
        },
        -1);
}

// columns [2 · far + 1], rising from 0 on: which column of a layer's products belongs to a query's distance from a key,
// from -far to far; farther ones count as these. Before the products.
TP_EXPORT int tp_encoder_set_distances(Encoder* encoder, const int32_t* columns, int far) {
    return guarded(
        [&] {
            require(far >= 0 && far < 1 << 20 && columns[0] >= 0 && columns[2 * far] < 1 << 20,
                    "columns of another size");
            for (int i = 0; i < 2 * far; i++) require(columns[i] <= columns[i + 1], "columns must rise");
            encoder->set_distances(columns, far);
            return 0;
        },
        -1);
}

// which: 0 what queries are multiplied with, 1 what keys are: values [heads, count, head size], for every column of
// distances, times the logits' scale.
TP_EXPORT int tp_encoder_set_distance_products(Encoder* encoder, int layer, int which, const float* values, int heads,
                                               int count) {
    return guarded(
        [&] {
            auto& place = const_cast<std::vector<Linear>&>(distance_products_at(*encoder, layer, which));
            const Shape& s = encoder->shape;
            require(heads == s.heads && count == encoder->distances.count(), "products of another size");
            std::vector<Linear> products;
            for (int head = 0; head < heads; head++, values += (size_t)count * s.head_size)
                products.push_back(pack_linear(*encoder->distance_kernels, encoder->memory, values, nullptr, nullptr,
                                               s.head_size, count));
            place = std::move(products);
            return 0;
        },
        -1);
}

// The same numbers, exactly as they are used.
TP_EXPORT int tp_encoder_get_distance_products(const Encoder* encoder, int layer, int which, float* values, int heads,
                                               int count) {
    return guarded(
        [&] {
            const std::vector<Linear>& products = distance_products_at(*encoder, layer, which);
            require((int)products.size() == heads && count == encoder->distances.count(), "products of another size");
            for (const Linear& linear : products) {
                encoder->distance_kernels->unpack_weight(linear.weight, linear.in, linear.out, values);
                values += (size_t)linear.in * linear.out;
            }
            return 0;
        },
        -1);
}

// which: 0 attention's, 1 the feed-forward's; layer -1: 0 the embeddings', 1 what comes after the last layer, 2 what
// comes after the embeddings' projection. beta may be null, for zeros.
TP_EXPORT int tp_encoder_set_norm(Encoder* encoder, int layer, int which, const float* gamma, const float* beta,
                                  int size) {
    return guarded(
        [&] {
            require(size > 0 && ((layer < 0 && which == 0) || size == encoder->shape.hidden), "a norm of another size");
            Norm norm{{gamma, gamma + size}, std::vector<float>(size)};
            if (beta) norm.beta.assign(beta, beta + size);
            const_cast<Norm&>(norm_at(*encoder, layer, which)) = std::move(norm);
            return 0;
        },
        -1);
}

TP_EXPORT int tp_encoder_get_norm(const Encoder* encoder, int layer, int which, float* gamma, float* beta, int size) {
    return guarded(
        [&] {
            const Norm& norm = norm_at(*encoder, layer, which);
            require((int)norm.gamma.size() == size, "a norm of another size");
            __builtin_memcpy(gamma, norm.gamma.data(), size * sizeof(float));
            __builtin_memcpy(beta, norm.beta.data(), size * sizeof(float));
            return 0;
        },
        -1);
}

// which: 0 words, 1 positions, 2 token types. values is [rows, size], of bfloat16 if `half`; size and half are those of
// all tables.
TP_EXPORT int tp_encoder_set_table(Encoder* encoder, int which, const void* values, int rows, int size, int half) {
    return guarded(
        [&] {
            Embeddings& e = encoder->embeddings;
            require(which >= 0 && which < 3 && rows > 0 && size > 0, "no such table");
            require(!e.size || (e.size == size && encoder->half_tables == (half != 0)), "a table of another size");
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

TP_EXPORT int tp_encoder_get_table(const Encoder* encoder, int which, void* values, int rows, int size) {
    return guarded(
        [&] {
            const Embeddings& e = encoder->embeddings;
            const char* table = which == 0 ? e.word : which == 1 ? e.position : e.type;
            const int there = which == 0 ? e.words : which == 1 ? e.positions : e.types;
            require(table && rows == there && size == e.size, "a table of another size");
            __builtin_memcpy(values, table, (size_t)rows * size * (encoder->half_tables ? 2 : 4));
            return 0;
        },
        -1);
}

TP_EXPORT int64_t tp_encoder_weight_bytes(const Encoder* encoder) { return (int64_t)encoder->memory.used(); }

// The workspace that a request needs, in bytes; -1: an error.
TP_EXPORT int64_t tp_encoder_workspace_bytes(const Encoder* encoder, const Request* request) {
    return guarded([&] { return (int64_t)encoder->workspace_bytes(*request); }, (int64_t)-1);
}

// 0: done; 1: it waits for a decision; -1: an error.
TP_EXPORT int tp_encoder_forward(const Encoder* encoder, Request* request) {
    return guarded([&] { return encoder->forward(*request) ? 0 : 1; }, -1);
}

// What tokens that left go on giving, see ContextMaps: for each of `count` layers, rising, 0 for tokens that never
// enter, down [rank, hidden] and its bias [rank]; for every layer of the encoder up [2 · key size, rank] and its bias.
TP_EXPORT ContextMaps* tp_context_new(const Encoder* encoder, const int32_t* layers, int count, int rank,
                                      const float* down, const float* down_bias, const float* up,
                                      const float* up_bias) {
    return guarded(
        [&] {
            const Shape& s = encoder->shape;
            const Kernels& kernels = encoder->kernels;
            require(rank > 0 && count > 0, "context needs a rank and layers");
            const int padded = (rank + 63) / 64 * 64, out = 2 * s.key_size();  // tiles need such sizes
            std::unique_ptr<ContextMaps> maps(new ContextMaps(kernels, s.layers, padded));
            std::vector<float> weight((size_t)padded * s.hidden), bias(padded);
            for (int i = 0; i < count; i++) {
                require(layers[i] >= 0 && layers[i] <= s.layers, "no such layer");
                std::copy_n(down + (size_t)i * rank * s.hidden, (size_t)rank * s.hidden, weight.data());
                std::copy_n(down_bias + (size_t)i * rank, rank, bias.data());
                maps->down[layers[i]] =
                    pack_linear(kernels, maps->memory, weight.data(), bias.data(), nullptr, s.hidden, padded);
            }
            std::vector<float> wide((size_t)out * padded);
            for (int l = 0; l < s.layers; l++, up += (size_t)out * rank, up_bias += out) {
                for (int i = 0; i < out; i++)
                    std::copy_n(up + (size_t)i * rank, rank, wide.data() + (size_t)i * padded);
                maps->up[l] = pack_linear(kernels, maps->memory, wide.data(), up_bias, nullptr, padded, out);
            }
            return maps.release();
        },
        (ContextMaps*)nullptr);
}

TP_EXPORT void tp_context_free(ContextMaps* maps) { delete maps; }

TP_EXPORT Head* tp_linear_new(int level, int dtype, const float* weight, const float* bias, const float* scale, int in,
                              int out) {
    return guarded(
        [&] {
            const Kernels& kernels = required_kernels(level, dtype);
            require(in > 0 && out > 0 && kernels.holds(in, out), "this kernel level does not fit these sizes");
            std::unique_ptr<Head> head(new Head{kernels, Slabs(0), {}});
            head->linear = pack_linear(kernels, head->memory, weight, bias, scale, in, out);
            return head.release();
        },
        (Head*)nullptr);
}

TP_EXPORT void tp_linear_free(Head* head) { delete head; }

// See tp_encoder_get_linear.
TP_EXPORT int tp_linear_get(const Head* head, float* weight, float* bias, float* scale) {
    return guarded(
        [&] {
            unpack_linear(head->kernels, head->linear, weight, bias, scale);
            return 0;
        },
        -1);
}

// out[rows, out] = x[rows, in] · weightᵀ + bias, both float32.
TP_EXPORT int tp_linear_apply(const Head* head, const float* x, int rows, float* out, int threads) {
    return guarded(
        [&] {
            apply_linear(head->kernels, head->linear, x, rows, out, threads);
            return 0;
        },
        -1);
}
