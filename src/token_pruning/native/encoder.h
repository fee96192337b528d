// A post-LayerNorm encoder (BERT's kind) over packed sequences, with tokens removed between attention and feed-forward.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace tp {

// Memory aligned for tiles and huge pages, never initialised. Throws std::bad_alloc.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
        other.data_ = nullptr, other.bytes_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept;
    char* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    char* data_ = nullptr;
    size_t bytes_ = 0;
};

// Memory for many matrices: one after the other in a few large pieces, since huge pages are whole or nothing.
class Slabs {
public:
    explicit Slabs(size_t slab_bytes) : slab_bytes_(slab_bytes) {}
    char* take(size_t bytes);
    size_t used() const { return used_; }

private:
    const size_t slab_bytes_;
    size_t left_ = 0, used_ = 0;
    std::vector<Buffer> slabs_;
};

struct Shape {
    int layers, hidden, heads, inner;
    float epsilon;
    Activation activation;
    int head_size() const { return hidden / heads; }
};

// A weight matrix packed for `kernels`; weight is [out, in], bias [out] or null.
Linear pack_linear(const Kernels& kernels, Slabs& slabs, const float* weight, const float* bias, int in, int out);
inline int panels(const Kernels& kernels, const Linear& linear) {
    return (linear.out + kernels.panel - 1) / kernels.panel;
}

struct Norm {
    std::vector<float> gamma, beta;
};

struct Layer {
    Linear query, key, value, output, up, down;
    Norm attention_norm, output_norm;
};

struct Embeddings {
    const char *word = nullptr, *position = nullptr, *type = nullptr;  // rows of bfloat16 or float32; type may be null
    int size = 0;  // width of the tables, which may differ from the encoder's
    int words = 0, positions = 0, types = 0;
    Norm norm;
    Linear projection;  // size → hidden, where they differ
};

// Decides what stays. Writes 1 or 0 per row to `keep`; returns non-zero to stop the forward pass.
typedef int (*Decide)(int layer, int rows, const int32_t* cu_seqlens, const float* received, uint8_t* keep);

struct Request {
    int sequences;
    const int32_t* cu_seqlens;               // [sequences + 1], rising: no sequence is empty
    const int32_t *ids, *positions, *types;  // [tokens]; types may be null
    int threads;
    // Absolute thresholds on received / N, N = divisor or the sequence's rows where that is 0; null: nothing is pruned
    // here. A layer prunes where prunes[layer] is set.
    const float* thresholds;
    const uint8_t* prunes;
    float divisor;
    Decide decide;    // takes the decisions in place of thresholds, or null
    bool first_only;  // only first tokens' states are wanted: the last layer computes no others
    bool record;      // decide in the last layer even where its decisions change nothing
    // Summary tokens: which of its sequence's summaries, 0 or 1, a dropped token goes to; null: 0. Used where `hosts`
    // is given: [tokens], zero at first, set to 1 for a dropped token whose row carries a summary from then on.
    const uint8_t* segments;
    uint8_t* hosts;
    float* out;         // [sequences, hidden] if first_only, else [tokens, hidden]: every token's last state
    int32_t* survived;  // [tokens]: layers after which the token was still there
    float* received;    // [layers, tokens] or null: attention each token received, untouched where none was computed
    double* seconds;    // [PARTS] or null: what the calling thread spent its time on
};

enum Part { EMBED, PACK, PROJECT, ATTEND, OUTPUT, UP, DOWN, NORM, DECIDE, PARTS };

class Encoder {
public:
    Encoder(const Kernels& kernels, Shape shape) : kernels(kernels), shape(shape), layers(shape.layers) {}
    // Non-zero when `decide` asked to stop.
    int forward(const Request& request);

    const Kernels& kernels;
    const Shape shape;
    std::vector<Layer> layers;
    Embeddings embeddings;
    bool half_tables = false;
    Slabs memory{32 << 20};  // of all matrices and tables

private:
    friend class Pass;
    Buffer borrow(size_t bytes);
    void give_back(Buffer buffer);
    std::mutex mutex_;
    std::vector<Buffer> workspaces_;  // as many as calls ever ran at once
};

// out[rows, linear.out] float32 = x[rows, linear.in] float32 · weightᵀ + bias.
void apply_linear(const Kernels& kernels, const Linear& linear, const float* x, int rows, float* out, int threads);

}  // namespace tp
