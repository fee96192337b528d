// Matrix products and attention in float32 vectors, for any sizes: AVX-512, AVX2 and plain C++ are this one file
// compiled three times (kernels_avx512.cpp, kernels_avx2.cpp, kernels_portable.cpp).
//
// Product. The weight is cut into panels of NR = 2·W columns, stored [panel][in][NR]; rows are packed in blocks of DEPTH
// input columns, stored [in / DEPTH][rows][DEPTH], so that a row's numbers lie at compile-time offsets. One panel's
// block of DEPTH rows (32 KiB with AVX-512) stays in the first-level cache while all packed rows pass by; MR rows × NR
// columns of sums stay in registers: 12 × 2 of 32 vectors (AVX-512), 6 × 2 of 16 (AVX2, SSE). bfloat16 and int8 weights
// are widened to float32 once per block. int8 rows hold whole numbers; scales are applied to the sums.
//
// Attention. Both products use the same registers' kernel: keys and values of one head are copied into panels, MR
// queries at a time.
#include "vector.h"

namespace tp {
namespace TP_LEVEL {

constexpr int NR = 2 * W;
constexpr int MR = W == 16 ? 12 : 6;
constexpr int DEPTH = 256;
constexpr int PREFETCH_STEP = 16;  // columns between two prefetches

static inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// sums[ROWS][NR] (+)= rows[ROWS][DEPTH] · panel[depth][NR]; rows of sums are `stride` apart. Every PREFETCH_STEP columns
// `lines` cache lines are prefetched from `prefetch` on.
template <int ROWS>
static void micro(const float* rows, const float* panel, int depth, float* sums, size_t stride, bool accumulate,
                  const char* prefetch, int lines) {
    Vec c[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        c[r][0] = accumulate ? load(sums + r * stride) : Vec{};
        c[r][1] = accumulate ? load(sums + r * stride + W) : Vec{};
    }
    for (int from = 0; from < depth; from += PREFETCH_STEP) {
        for (int i = 0; i < lines; i++) __builtin_prefetch(prefetch + 64 * i, 0, 2);
        prefetch += 64 * lines;
        const int to = smaller(depth, from + PREFETCH_STEP);
        for (int k = from; k < to; k++) {
            Vec b0 = load(panel + (size_t)k * NR), b1 = load(panel + (size_t)k * NR + W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                Vec a = all(rows[r * DEPTH + k]);
                c[r][0] += a * b0;
                c[r][1] += a * b1;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        store(sums + r * stride, c[r][0]);
        store(sums + r * stride + W, c[r][1]);
    }
}

typedef void (*Micro)(const float*, const float*, int, float*, size_t, bool, const char*, int);
template <int... ROWS>
struct MicroTable {
    static constexpr Micro table[] = {micro<ROWS + 1>...};
};
#if defined(__AVX512F__)
typedef MicroTable<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11> Micros;
#else
typedef MicroTable<0, 1, 2, 3, 4, 5> Micros;
#endif

static void micro_any(int count, const float* rows, const float* panel, int depth, float* sums, size_t stride,
                      bool accumulate, const char* prefetch = nullptr, int lines = 0) {
    Micros::table[count - 1](rows, panel, depth, sums, stride, accumulate, prefetch, lines);
}

static bool fits(int, int, int head_size) { return head_size <= DEPTH; }

template <class Weight>
static size_t weight_bytes(int in, int out) {
    return round_up(out, NR) * in * sizeof(Weight);
}

static inline void convert(float x, float* to) { *to = x; }
static inline void convert(float x, uint16_t* to) { *to = to_half(x); }

template <class Weight>
static void pack_weight(const float* weight, int in, int out, void* packed, float*) {
    Weight* p = (Weight*)packed;
    for (int panel = 0; panel < out; panel += NR)
        for (int k = 0; k < in; k++)
            for (int n = panel; n < panel + NR; n++) convert(n < out ? weight[(size_t)n * in + k] : 0.0f, p++);
}

static void pack_weight_int8(const float* weight, int in, int out, void* packed, float* scale) {
    int8_t* p = (int8_t*)packed;
    for (int n = 0; n < out; n++) {
        float most = 0;
        for (int k = 0; k < in; k++) most = __builtin_fmaxf(most, __builtin_fabsf(weight[(size_t)n * in + k]));
        scale[n] = most > 0 ? most / 127.0f : 1.0f;
    }
    for (int panel = 0; panel < out; panel += NR)
        for (int k = 0; k < in; k++)
            for (int n = panel; n < panel + NR; n++)
                *p++ = n < out ? (int8_t)__builtin_rintf(weight[(size_t)n * in + k] / scale[n]) : 0;
}

static size_t packed_rows_bytes(int rows, int in) { return round_up(in, DEPTH) * rows * sizeof(float); }

template <bool QUANTIZE>
static void pack_rows(const void* source, bool, size_t stride, const int* index, int begin, int end, int rows, int in,
                      void* packed, float* row_scale) {
    for (int r = begin; r < end; r++) {
        const float* x = (const float*)source + (size_t)(index ? index[r] : r) * stride;
        float factor = 1;
        if (QUANTIZE) {
            float most = 0;
            for (int k = 0; k < in; k++) most = __builtin_fmaxf(most, __builtin_fabsf(x[k]));
            row_scale[r] = most > 0 ? most / 127.0f : 1.0f;
            factor = most > 0 ? 127.0f / most : 1.0f;
        }
        for (int k = 0; k < in; k += DEPTH) {
            float* to = (float*)packed + ((size_t)(k / DEPTH) * rows + r) * DEPTH;
            int count = smaller(DEPTH, in - k);
            if (QUANTIZE)
                for (int i = 0; i < count; i++) to[i] = __builtin_rintf(x[k + i] * factor);
            else
                memcpy(to, x + k, count * sizeof(float));
        }
    }
}

static size_t product_scratch(int rows, int, int) { return ((size_t)rows + DEPTH) * NR * sizeof(float); }

static inline const float* widen(const float* panel, int, float*) { return panel; }
static inline const float* widen(const uint16_t* panel, int depth, float* to) {
    for (int i = 0; i < depth * NR; i += W) store(to + i, load(panel + i));
    return to;
}
static inline const float* widen(const int8_t* panel, int depth, float* to) {
    for (int i = 0; i < depth * NR; i++) to[i] = panel[i];
    return to;
}

static void finish(const Product& p, const float* sums, int row, int column, int count) {
    const Linear& w = *p.linear;
    float values[NR];
    for (int half = 0; half < 2; half++) {
        int first = column + half * W;
        if (first + W <= w.out) {
            Vec v = load(sums + half * W);
            if (w.scale) v = v * p.row_scale[row] * load(w.scale + first);
            store(values + half * W, v + load(w.bias + first));
            continue;
        }
        for (int i = 0; first + i < w.out && i < W; i++) {
            float v = sums[half * W + i];
            if (w.scale) v = v * p.row_scale[row] * w.scale[first + i];
            values[half * W + i] = v + w.bias[first + i];
        }
        for (int i = larger(0, w.out - first); i < W; i++) values[half * W + i] = 0;
    }
    float* out = (float*)p.out + (size_t)row * p.out_stride + column;
    switch (p.epilogue) {
        case Epilogue::store:
        case Epilogue::store_float:
            memcpy(out, values, count * sizeof(float));
            break;
        case Epilogue::activate_pack:
        case Epilogue::activate_store:
            for (int half = 0; half < 2; half++)
                store(values + half * W, activate(load(values + half * W), p.activation));
            if (p.epilogue == Epilogue::activate_pack)
                out = (float*)p.out + ((size_t)(column / DEPTH) * p.rows + row) * DEPTH + column % DEPTH;
            memcpy(out, values, count * sizeof(float));
            break;
        case Epilogue::residual: {
            const float* other =
                p.residual + (size_t)(p.residual_index ? p.residual_index[row] : row) * p.out_stride + column;
            for (int i = 0; i < count; i++) out[i] = values[i] + other[i];
        }
    }
}

template <class Weight>
static void multiply(const Product& p) {
    const Linear& w = *p.linear;
    float* sums = (float*)p.scratch;
    float* widened = sums + (size_t)p.rows * NR;
    // As even as can be: a last step of one or two rows would wait for its own sums.
    const int steps = (p.rows + MR - 1) / MR, step = (p.rows + steps - 1) / steps;
    const Weight* end = (const Weight*)w.weight + (size_t)p.last_panel * w.in * NR;
    for (int panel = p.first_panel; panel < p.last_panel; panel++) {
        const int columns = smaller(NR, w.out - panel * NR);
        for (int k = 0; k < w.in; k += DEPTH) {
            const int depth = smaller(DEPTH, w.in - k);
            const Weight* block = (const Weight*)w.weight + ((size_t)panel * w.in + k) * NR;
            const float* b = widen(block, depth, widened);
            const float* a = (const float*)p.packed_rows + (size_t)(k / DEPTH) * p.rows * DEPTH;
            // The next block, which follows in memory, spread over this one's steps.
            const char* next = (const char*)(block + (size_t)depth * NR);
            const int slots = (depth + PREFETCH_STEP - 1) / PREFETCH_STEP;
            const int ahead = (int)(smaller(depth * NR, (int)(end - block) - depth * NR) * sizeof(Weight) / 64);
            const int lines = (ahead + steps * slots - 1) / (steps * slots);
            for (int r = 0, fetched = 0; r < p.rows; r += step, fetched += slots * lines) {
                const int count = smaller(step, p.rows - r);
                micro_any(count, a + (size_t)r * DEPTH, b, depth, sums + (size_t)r * NR, NR, k > 0,
                          next + (size_t)fetched * 64, fetched < ahead ? lines : 0);
                if (k + depth == w.in)
                    for (int i = r; i < r + count; i++) finish(p, sums + (size_t)i * NR, i, panel * NR, columns);
            }
        }
    }
}

// Scratch: key panels [keys / NR][head][NR], value panels [head / NR][keys][NR], MR scaled queries, their scores in
// blocks of DEPTH keys, MR rows of context.
static size_t attention_scratch(int keys, int head_size) {
    size_t wide_keys = round_up(keys, DEPTH), wide_head = round_up(head_size, NR);
    return (wide_keys * head_size + wide_head * keys + MR * DEPTH + MR * wide_keys + MR * wide_head) * sizeof(float);
}

static void attend(const Attention& a) {
    const int n = a.keys, size = a.head_size, wide_head = (int)round_up(size, NR);
    const size_t wide_keys = round_up(n, DEPTH);
    float* keys = (float*)a.scratch;
    float* values = keys + wide_keys * size;
    float* queries = values + (size_t)wide_head * n;
    float* scores = queries + MR * DEPTH;
    float* context = scores + MR * wide_keys;

    const float *k = (const float*)a.key, *v = (const float*)a.value;
    for (int j = 0; j < n; j += NR)
        for (int d = 0; d < size; d++)
            for (int i = 0; i < NR; i++)
                keys[((size_t)(j / NR) * size + d) * NR + i] = j + i < n ? k[(size_t)(j + i) * a.stride + d] : 0.0f;
    for (int d = 0; d < wide_head; d += NR)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < NR; i++)
                values[((size_t)(d / NR) * n + j) * NR + i] = d + i < size ? v[(size_t)j * a.stride + d + i] : 0.0f;
    if (a.received) memset(a.received, 0, n * sizeof(float));

    for (int first = 0; first < a.queries; first += MR) {
        int count = smaller(MR, a.queries - first);
        for (int r = 0; r < count; r++) {
            const float* q = (const float*)a.query + (size_t)(first + r) * a.query_stride;
            for (int d = 0; d < size; d++) queries[r * DEPTH + d] = q[d] * a.scale;
        }
        // Row r's score of key j lies at scores[(j / DEPTH · MR + r) · DEPTH + j % DEPTH].
        for (int j = 0; j < n; j += NR)
            micro_any(count, queries, keys + (size_t)(j / NR) * size * NR, size,
                      scores + (size_t)(j / DEPTH) * MR * DEPTH + j % DEPTH, DEPTH, false);
        for (int r = 0; r < count; r++) {
            Vec most = all(-3e38f);
            Vec total = Vec{};
            float top, rest = 0;
            for (int block = 0; block < n; block += DEPTH) {
                const float* s = scores + ((size_t)(block / DEPTH) * MR + r) * DEPTH;
                int here = smaller(DEPTH, n - block), whole = here / W * W;
                for (int j = 0; j < whole; j += W) most = maximum(most, load(s + j));
                for (int j = whole; j < here; j++) most = maximum(most, all(s[j]));
            }
            top = largest(most);
            for (int block = 0; block < n; block += DEPTH) {
                float* s = scores + ((size_t)(block / DEPTH) * MR + r) * DEPTH;
                int here = smaller(DEPTH, n - block), whole = here / W * W;
                for (int j = 0; j < whole; j += W) {
                    Vec e = exponential(load(s + j) - top);
                    store(s + j, e);
                    total += e;
                }
                if (whole < here) {  // panels reach past the last key, so a whole vector can be read and written
                    float e[W];
                    store(e, exponential(load(s + whole) - top));
                    for (int j = whole; j < here; j++) rest += s[j] = e[j - whole];
                }
            }
            float inverse = 1.0f / (sum(total) + rest);
            for (int block = 0; block < n; block += DEPTH) {
                float* s = scores + ((size_t)(block / DEPTH) * MR + r) * DEPTH;
                int here = smaller(DEPTH, n - block);
                for (int j = 0; j < here; j++) s[j] *= inverse;
                if (a.received)
                    for (int j = 0; j < here; j++) a.received[block + j] += s[j];
            }
        }
        for (int d = 0; d < wide_head; d += NR)
            for (int block = 0; block < n; block += DEPTH)
                micro_any(count, scores + (size_t)(block / DEPTH) * MR * DEPTH,
                          values + ((size_t)(d / NR) * n + block) * NR, smaller(DEPTH, n - block), context + d,
                          wide_head, block > 0);
        for (int r = 0; r < count; r++)
            memcpy((float*)a.context + (size_t)(first + r) * a.context_stride, context + (size_t)r * wide_head,
                   size * sizeof(float));
    }
}

static void nothing() {}

template <class Weight>
static constexpr Kernels table_of(const char* name, const char* description, bool quantized,
                                  void (*pack)(const float*, int, int, void*, float*)) {
    return {name,
            description,
            NR,
            1,
            144,
            false,
            quantized,
            fits,
            weight_bytes<Weight>,
            pack,
            packed_rows_bytes,
            quantized ? pack_rows<true> : pack_rows<false>,
            product_scratch,
            multiply<Weight>,
            attention_scratch,
            attend,
            normalize,
            embed,
            add_rows,
            nothing,
            nothing};
}

static const Kernels* kernels(const char* name, Dtype dtype) {
    static const Kernels tables[] = {
        table_of<float>(name, "float32 products", false, pack_weight<float>),
        table_of<uint16_t>(name, "bfloat16 weights, products in float32", false, pack_weight<uint16_t>),
        table_of<int8_t>(name, "int8 weights and activations, products in float32", true, pack_weight_int8),
    };
    return &tables[(int)dtype];
}

}  // namespace TP_LEVEL
}  // namespace tp
