// A Transformer encoder over packed sequences, with tokens removed between attention and feed-forward. One description
// of a layer serves every family: Shape is what all layers share, Step what is a layer's own, Layer its weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
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
    int layers, hidden, heads, key_heads, head_size, inner;  // each of the key_heads serves heads / key_heads queries
    float epsilon;                                           // of every norm
    float scale;                                             // of query · key
    Activation activation;
    bool norm_first;  // norms before attention and feed-forward instead of after their residuals
    bool rms_norm;    // norms take no mean off
    bool gated;       // activation(gate · x) times up · x enters the feed-forward's second half
    int query_size() const { return heads * head_size; }
    int key_size() const { return key_heads * head_size; }
};

// A weight matrix packed for `kernels`; weight is [out, in], bias [out] or null. With `scale` [out] the weights are
// whole numbers already, as unpack_linear gives them for int8.
Linear pack_linear(const Kernels& kernels, Slabs& slabs, const float* weight, const float* bias, const float* scale,
                   int in, int out);
// The same again, to the last bit; `scale` is written for int8 alone.
void unpack_linear(const Kernels& kernels, const Linear& linear, float* weight, float* bias, float* scale);
inline int panels(const Kernels& kernels, const Linear& linear) {
    return (linear.out + kernels.panel - 1) / kernels.panel;
}

struct Norm {
    std::vector<float> gamma, beta;
};

// Disentangled attention: what each head's rows are multiplied with for every column of distances, scaled as logits
// are.
struct DistanceProducts {
    std::vector<Linear> of_queries, of_keys;  // [heads] of head size → columns, or none
    bool any() const { return !of_queries.empty() || !of_keys.empty(); }
};

// A layer's weights. Where the norm comes first, attention_norm may be empty: there is none before attention.
struct Layer {
    Linear query, key, value, output, gate, up, down;
    Norm attention_norm, output_norm;  // before or after attention and feed-forward
    DistanceProducts distance;
};

// One turn of the encoder: whose weights, and what else a layer has of its own.
struct Step {
    int weights;        // number of the Layer: several steps may share one
    int window = -1;    // greatest distance at which tokens attend to each other; below 0: any
    int rotation = -1;  // number of the Rotation of queries and keys; below 0: none
};

// Rotary positions: columns i and i + head_size / 2 of a head are turned by position · frequencies[i].
struct Rotation {
    std::vector<float> frequencies;  // [head_size / 2]
    float factor = 1;                // of what comes out
};

// Added to every layer's logits by the distance of a query's place from a key's; see LogitTerms.
struct DistanceBias {
    std::vector<float> table;  // [heads, 2 · far + 1], with the edges that kernels read; empty: there is none
    int far = 0;
};

// Which column of DistanceProducts belongs to the distance of a query's place from a key's.
struct DistanceColumns {
    std::vector<int32_t> columns;  // [2 · far + 1], rising, with the edge that kernels read; empty: there are none
    int far = 0;                   // greater distances count as this one
    int count() const { return columns.back() + 1; }
    int of(int distance) const { return columns[std::max(-far, std::min(distance, far)) + far]; }
};

// Keys and values that tokens go on giving after they left. A token's state where it left times `down` is its code, and
// its code times a layer's `up` all its keys, before they turn, and then all its values, there. The kernels are the
// encoder's.
struct ContextMaps {
    ContextMaps(const Kernels& kernels, int layers, int rank)
        : kernels(kernels), rank(rank), down(layers + 1), up(layers) {}
    const Kernels& kernels;
    const int rank;
    // For tokens that never enter, then for those that leave after each layer; none where they are gone.
    std::vector<Linear> down;  // [layers + 1] of hidden → rank
    std::vector<Linear> up;    // [layers] of rank → 2 · key size
    Slabs memory{0};
};

struct Embeddings {
    // Rows of bfloat16 or float32, of one width, which may differ from the encoder's. All but `word` may be null.
    const char *word = nullptr, *position = nullptr, *type = nullptr;
    int size = 0;
    int words = 0, positions = 0, types = 0;
    Norm norm;            // may be empty
    Linear projection;    // size → hidden, or none
    Norm projected_norm;  // after it; may be empty
};

// What a forward pass reads and writes. Everything it points to must stay where it is until the pass is done.
// `threads`, `tokens` and the sizes below must be those of the call that asked for the workspace's size.
struct Request {
    int sequences;
    int tokens;  // cu_seqlens[sequences]
    int layers;  // the encoder's
    int threads;
    const int32_t* cu_seqlens;               // [sequences + 1], rising: no sequence is empty
    const int32_t *ids, *positions, *types;  // [tokens]; types may be null
    // Where in the text each token stands, [tokens], rising within a sequence: for windows and whatever goes by
    // distance.
    const int32_t* places;
    // Absolute thresholds [layers] on received / N, N = divisor or the sequence's rows where that is 0, or on what a
    // probe says; null: nothing is pruned by them. A layer prunes where prunes[layer] is set.
    const float* thresholds;
    const uint8_t* prunes;  // [layers]
    float divisor;
    bool first_only;       // only first tokens' states are wanted: the last layer computes no others
    bool record;           // decide in the last layer even where its decisions change nothing
    bool departed;         // last states of tokens that left are wanted too; else their rows of `out` are not written
    bool unread;           // these without the norm that comes after the last layer
    const uint8_t* stays;  // [tokens] or null: 1 for a token that never leaves, as no sequence's first token does
    // Whose attention counts, [tokens] of 1 or 0; null: everybody's. Those of a sequence are next to each other; what
    // they pay to a token, averaged, times the sequence's rows, is what it received. Where none of them is left, all
    // count. A row that carries a summary counts as the token whose row it was.
    const uint8_t* asks;
    // Probes, [layers, hidden + 1], or null: where probed[layer] is set, decisions go by probe · row + its last number
    // in place of attention received, row being a token's state after the layer's attention block. Not with summaries.
    const float* probes;
    const uint8_t* probed;  // [layers]
    // Summary tokens: which of its sequence's summaries, 0 or 1, a dropped token goes to; null: 0. Used where `hosts`
    // is given: [tokens], zero at first, set to 1 for a dropped token whose row carries a summary from then on.
    const uint8_t* segments;  // [tokens]
    uint8_t* hosts;
    // Context, or null: tokens with outside[t] 1 (null: none) never enter the first layer, and no sequence's first
    // token is one; these and those that leave are attended to still where `context` has a `down` for them. Not with
    // summaries.
    const ContextMaps* context;
    const uint8_t* outside;  // [tokens]
    float* out;              // [sequences, hidden] if first_only, else [tokens, hidden]: tokens' last states
    int32_t* survived;       // [tokens], zero at first, −1 outside: layers after which the token was still there
    float* received;         // [layers, tokens] or null: what each layer decided by, untouched where it did not
    double* seconds;         // [PARTS] or null: what the calling thread spent its time on
    char* workspace;  // aligned to 64 bytes; nothing else is needed between calls, and nothing is kept after the last
    size_t workspace_bytes;
    // Decisions taken by the caller in place of thresholds: forward() returns at each with `layer`, `rows`, and what
    // each row received, or its probe says, in importance[0, rows); the caller writes 1 or 0 to keep[0, rows) and
    // calls again. Rows whose keep nobody wrote are found out. Both [tokens], or null.
    float* importance;
    uint8_t* keep;
    bool waiting;  // false at first
    int layer, rows;
};

enum Part { EMBED, PACK, PROJECT, ATTEND, OUTPUT, UP, DOWN, NORM, DECIDE, PARTS };

class Encoder {
public:
    Encoder(const Kernels& kernels, Shape shape) : kernels(kernels), shape(shape), layers(shape.layers) {
        for (int l = 0; l < shape.layers; l++) steps.push_back({l});
    }
    // table[heads, 2 · far + 1].
    void set_bias(const float* table, int far);
    // columns[2 · far + 1], rising from 0 on.
    void set_distances(const int32_t* columns, int far);
    // Whether everything a forward pass reads was set.
    bool complete() const;
    // Bytes of workspace that a request needs. With wide = bytes of the exchange type, N tokens, H hidden, F inner, Q
    // and K all heads' queries and keys (H where nothing else is said), E the widest of H, Q, the tables and ranks, S
    // sequences, T threads, and R = N, or where that is less the longest sequence or the kernels' chunk_rows, whichever
    // is more, rounded up to 32:
    //     N · (8·H + wide·Q) + N · 44 + S · 64                  states, context, who is where
    //     (N + 2·S) · 4·H with summary tokens, N · 4·H with probes, N · 4 · head size for each rotation
    //     T · R · (4·H + wide · (2·Q + 2·K) + 4·E + 8·heads)    a chunk's rows: projections, sums
    //     N · (4·rank + 20), and T · R · (4·rank + 4·wide·K) with context
    //     T · 8·R·C, C columns of distances, and R packed rows of a head, for disentangled attention
    //     T · packed rows of R · (E + F), for int8 R · F · wide, and twice that where the feed-forward is gated, and
    //     the kernels' scratch for R rows and for the longest sequence's keys (product_scratch, attention_scratch)
    // and some padding. It grows in proportion to tokens and threads, never with a sequence's square.
    size_t workspace_bytes(const Request& request) const;
    // False when it waits for a decision; allocates nothing. Throws std::invalid_argument for what it cannot take.
    bool forward(Request& request) const;

    const Kernels& kernels;
    const Shape shape;
    std::vector<Layer> layers;  // those that `steps` name
    std::vector<Step> steps;
    std::vector<Rotation> rotations;
    DistanceBias bias;
    DistanceColumns distances;                  // empty: no layer has DistanceProducts
    const Kernels* distance_kernels = nullptr;  // of DistanceProducts: not quantised, of the same exchange type
    Embeddings embeddings;
    Norm last_norm;  // after the last layer; may be empty
    bool half_tables = false;
    Slabs memory{32 << 20};  // of all matrices and tables
};

// out[rows, linear.out] float32 = x[rows, linear.in] float32 · weightᵀ + bias.
void apply_linear(const Kernels& kernels, const Linear& linear, const float* x, int rows, float* out, int threads);

}  // namespace tp
