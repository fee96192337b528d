// What a kernel level offers to the encoder: one table of functions per instruction set and weight type.
//
// A level is a set of functions compiled for one instruction set. The encoder (encoder.cpp) knows nothing but this
// table. A row's results never depend on the other rows of a call: every sum runs over its terms in one fixed order.
// What is not finite is never lost: a NaN or infinity that a result depends on makes it NaN or infinite, and finite
// numbers stay so where float32 products of them do.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp {

enum class Dtype : int { float32 = 0, bfloat16 = 1, int8 = 2 };
enum class Activation : int { gelu = 0, relu = 1, gelu_tanh = 2, silu = 3 };

// What happens to a product's sums, after weight scale and bias.
enum class Epilogue : int {
    store,           // to rows of the level's exchange type (bfloat16 or float32)
    store_float,     // to rows of float32
    activate_pack,   // activation, straight into the next product's packed rows (not for int8)
    activate_store,  // activation, to rows of the exchange type
    residual,        // plus a gathered row of float32, to rows of float32
};

// A weight matrix [out, in], packed by the level it is for.
struct Linear {
    int in = 0;
    int out = 0;
    void* weight = nullptr;
    const float* bias = nullptr;   // [out]
    const float* scale = nullptr;  // [out]: what an int8 weight is multiplied by; null for other types
};

// out[rows, out] = packed rows · weightᵀ, for the panels [first_panel, last_panel) of the output's columns.
struct Product {
    const Linear* linear;
    const void* packed_rows;
    const float* row_scale;  // int8: what each row's numbers are multiplied by
    int rows;
    int first_panel, last_panel;
    Epilogue epilogue;
    Activation activation;
    void* out;
    size_t out_stride;          // in elements
    const float* residual;      // rows of float32, `out_stride` apart
    const int* residual_index;  // which row of `residual` belongs to each row; null: the same
    void* scratch;
};

// Disentangled attention: what each distance adds to a logit by the query, and by the key.
struct DistanceTerms {
    // Rows, `stride` apart, of a number per column of distances; null: nothing is added by queries, or by keys. After
    // each row, and after `columns`, DISTANCE_EDGE more numbers can be read.
    const float *of_queries = nullptr, *of_keys = nullptr;
    size_t stride = 0;
    // [2 · far + 1]: the column for query − key from −far to far, rising, farther ones as the outermost; null: no
    // terms.
    const int32_t* columns = nullptr;
    int far = 0;
};
constexpr int DISTANCE_EDGE = 32;

// What is added to attention logits by the places of a query and a key in the text, which rise with the rows.
struct LogitTerms {
    const int* query_places = nullptr;  // [queries]; null: nothing is added
    const int* key_places = nullptr;    // [keys]
    int window = -1;                    // greatest distance at which attention is paid; below 0: any
    // [2 · far + 1] for query − key from −far to far, farther ones as the outermost; null: none. The outermost
    // BIAS_EDGE numbers on either side are all the same.
    const float* bias = nullptr;
    int far = 0;
    DistanceTerms distance;
    bool any() const { return query_places != nullptr; }
};
constexpr int BIAS_EDGE = 64;

// One head of one sequence: softmax(q·kᵀ·scale + terms)·v and, for every key, the sum of the attention it receives.
struct Attention {
    const void *query, *key, *value;  // exchange type; rows `stride` elements apart
    size_t query_stride, stride;
    int queries, keys, head_size;
    float scale;
    void* context;  // exchange type, rows `context_stride` apart
    size_t context_stride;
    float* received;  // [keys], or null where nobody asks
    void* scratch;
    LogitTerms terms;
};

struct Kernels {
    const char* level;
    const char* description;
    int panel;          // columns of a weight panel
    int chunk_rows;     // rows a thread works on at a time, so that they stay in its second-level cache
    bool half;          // the exchange type is bfloat16, else float32
    bool quantized;     // rows carry a scale, and activations are packed in a pass of their own
    bool whole_panels;  // products write whole panels of columns: what has others cannot be multiplied

    // A matrix that a level cannot hold (tiles need multiples of 32 or 64) goes to the next level.
    bool (*fits)(int hidden, int inner, int head_size);
    size_t (*weight_bytes)(int in, int out);
    // weight is [out, in]. int8: writes scale[out]; where `given` [out] is not null, the weight is whole numbers with
    // these scales, as unpack_weight and the Linear have them, perhaps another level's.
    void (*pack_weight)(const float* weight, const float* given, int in, int out, void* packed, float* scale);
    // The numbers that were packed, [out, in]: for int8 without their scale.
    void (*unpack_weight)(const void* packed, int in, int out, float* weight);
    size_t (*packed_rows_bytes)(int rows, int in);
    // Rows [begin, end) of a block of `rows`; begin is a multiple of 16. source_half: rows are bfloat16.
    void (*pack_rows)(const void* source, bool source_half, size_t stride, const int* index, int begin, int end,
                      int rows, int in, void* packed, float* row_scale);
    size_t (*product_scratch)(int rows, int in, int out);
    void (*multiply)(const Product&);
    size_t (*attention_scratch)(int keys, int head_size);
    void (*attend)(const Attention&);
    // LayerNorm of float32 rows [begin, end), or their RMS norm, which takes no mean off; in and out may be the same.
    void (*normalize)(const float* in, float* out, int begin, int end, int size, const float* gamma, const float* beta,
                      float epsilon, bool rms);
    // Rotary positions: each of `heads` heads side by side in the rows [begin, end), of the exchange type, is turned by
    // its row's angles. Those of row r are at angles + index[r] · head_size, head_size / 2 cosines, then the sines.
    void (*rotate)(void* rows, size_t stride, int begin, int end, int heads, int head_size, const float* angles,
                   const int* index);
    // Rows [begin, end) of the exchange type, `size` numbers a and then `size` numbers b: a becomes activation(a) · b.
    void (*gate)(void* rows, size_t stride, int begin, int end, int size, Activation activation);
    // One row: out = word (+ type) (+ position), tables of bfloat16 or float32.
    void (*embed)(const void* word, const void* position, const void* type, bool half_tables, int size, float* out);
    // Around a thread's work: AMX tiles have to be configured, and released.
    void (*enter)();
    void (*leave)();

    // Whether a single matrix [out, in] can be multiplied, beyond what an encoder's must be for `fits`.
    bool holds(int in, int out) const { return fits(in, in, 32) && (!whole_panels || out % panel == 0); }
};

// Null where the level has nothing of its own for the dtype: the levels below it have.
const Kernels* portable_kernels(Dtype);
const Kernels* avx2_kernels(Dtype);
const Kernels* avx_vnni_kernels(Dtype);
const Kernels* avx512_kernels(Dtype);
const Kernels* avx512_vnni_kernels(Dtype);
const Kernels* avx512_bf16_kernels(Dtype);
const Kernels* amx_kernels(Dtype);
const Kernels* neon_kernels(Dtype);
const Kernels* dotprod_kernels(Dtype);
const Kernels* i8mm_kernels(Dtype);

}  // namespace tp
