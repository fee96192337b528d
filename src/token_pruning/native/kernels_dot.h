// Matrix products by instructions that multiply groups of narrow numbers and add them to 32-bit sums: four int8 to
// whole numbers, or two bfloat16 to float32. Everything else, and attention in float32, is that of kernels_vector.h.
//
// An instruction set is a type T:
//     Number, group   what is multiplied, and how many of them make 32 bits
//     Sum             W sums: VecInt or Vec
//     rows            rows whose sums fit the registers, with two vectors of columns
//     limit, offset   int8: the largest whole number of a weight; what is added to those of a row, ±127, when it is
//     packed add(s, a, b)    s + Σ a·b, group by group; a are numbers of a row, b of the weight
//
// Sums of int8 are exact: `limit` is such that add() never saturates, and 32 bits hold the sums of `fits`. A row's
// offset is taken back by what the sums begin with, -offset · Σ weights of the column, which is packed before a panel.
//
// The weight is cut into panels of NR = 2·W columns, stored [panel][NR first sums, then in / group][NR][group]. Rows
// are packed in blocks of at most DOT_DEPTH groups of input columns, stored [block][rows][DOT_DEPTH][group], so that a
// row's groups lie at compile-time offsets. A panel's block (24 KiB with AVX-512) stays in the first-level cache while
// all rows pass by from the second; meanwhile the next is prefetched.
#include "kernels_vector.h"

namespace tp {
namespace TP_LEVEL {

constexpr int DOT_DEPTH = 192;  // groups; a multiple of W, so that no vector of packed numbers lies in two blocks

template <class T>
static inline int groups_of(int in) {
    return (in + T::group - 1) / T::group;
}

// Groups of a block: blocks are as even as can be.
static inline int dot_depth(int groups) {
    const int blocks = (groups + DOT_DEPTH - 1) / DOT_DEPTH;
    return (int)round_up((groups + blocks - 1) / blocks, W);
}

static inline VecInt load(const int32_t* p) {
    VecInt v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(int32_t* p, VecInt v) { memcpy(p, &v, sizeof v); }
static inline void store(int32_t* p, Vec v) { memcpy(p, &v, sizeof v); }
static inline Vec to_float(VecInt v) { return __builtin_convertvector(v, Vec); }
static inline Vec to_float(Vec v) { return v; }
static inline VecInt all(int32_t x) {
#if defined(__AVX512F__)
    return (VecInt)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
    return (VecInt)_mm256_set1_epi32(x);
#else
    return VecInt{x, x, x, x};
#endif
}

// to[ROWS][NR] = from + rows[ROWS][depth groups] · panel[depth groups][NR]; rows of `from` are `from_stride` apart.
// Group (r, k) of the rows lies at r · ROW_STRIDE + k · COLUMN_STRIDE.
struct DotArguments {
    const int32_t* rows;
    const int32_t* panel;
    int depth;
    const int32_t* from;
    size_t from_stride;
    int32_t* to;
    const char* prefetch;
    int lines;
};

template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int ROWS>
static void dot_micro(const DotArguments& m) {
    typename T::Sum c[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        c[r][0] = (typename T::Sum)load(m.from + r * m.from_stride);
        c[r][1] = (typename T::Sum)load(m.from + r * m.from_stride + W);
    }
    const int32_t *rows = m.rows, *panel = m.panel;
    const char* prefetch = m.prefetch;
    for (int from = 0; from < m.depth; from += PREFETCH_STEP) {
        for (int i = 0; i < m.lines; i++) __builtin_prefetch(prefetch + 64 * i, 0, 2);
        prefetch += 64 * m.lines;
        for (int k = smaller(PREFETCH_STEP, m.depth - from); k > 0; k--) {
            const VecInt b0 = load(panel), b1 = load(panel + W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const VecInt a = all(rows[r * ROW_STRIDE]);
                c[r][0] = T::add(c[r][0], a, b0);
                c[r][1] = T::add(c[r][1], a, b1);
            }
            panel += NR;
            rows += COLUMN_STRIDE;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        store(m.to + r * NR, c[r][0]);
        store(m.to + r * NR + W, c[r][1]);
    }
}

template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int COUNT = T::rows, int... ROWS>
struct DotTable : DotTable<T, ROW_STRIDE, COLUMN_STRIDE, COUNT - 1, COUNT, ROWS...> {};
template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int... ROWS>
struct DotTable<T, ROW_STRIDE, COLUMN_STRIDE, 0, ROWS...> {
    static constexpr void (*table[])(const DotArguments&) = {dot_micro<T, ROW_STRIDE, COLUMN_STRIDE, ROWS>...};
};

template <class T>
static constexpr bool is_int8 = sizeof(typename T::Number) == 1;

template <class T>
static bool dot_fits(int hidden, int inner, int) {
    return !is_int8<T> || (hidden <= 1 << 17 && inner <= 1 << 17);  // 127 · 127 · 2¹⁷ < 2³¹
}

static inline size_t panel_bytes(int groups) { return (size_t)(1 + groups) * NR * sizeof(int32_t); }

template <class T>
static size_t dot_weight_bytes(int in, int out) {
    return (out + NR - 1) / NR * panel_bytes(groups_of<T>(in));
}

template <class T>
static void dot_pack_weight(const float* weight, const float* given, int in, int out, void* packed, float* scale) {
    typedef typename T::Number Number;
    const int groups = groups_of<T>(in);
    for (int panel = 0; panel < out; panel += NR) {
        WeightRow rows[NR] = {};
        for (int n = panel; scale && n < smaller(out, panel + NR); n++) {
            rows[n - panel] = weight_row(weight + (size_t)n * in, in, T::limit, given ? given + n : nullptr);
            scale[n] = rows[n - panel].scale;
        }
        int32_t* first = (int32_t*)((char*)packed + panel / NR * panel_bytes(groups));
        for (int i = 0; i < NR; i++) first[i] = 0;
        Number* to = (Number*)(first + NR);
        for (int g = 0; g < groups; g++)
            for (int n = panel; n < panel + NR; n++)
                for (int k = g * T::group; k < (g + 1) * T::group; k++) {
                    const float x = n < out && k < in ? weight[(size_t)n * in + k] : 0.0f;
                    if (is_int8<T>) {
                        const int whole = n < out ? (int)rows[n - panel].whole(x) : 0;
                        first[n - panel] -= T::offset * whole;
                        *to++ = (Number)whole;
                    } else {
                        *to++ = (Number)to_half(x);
                    }
                }
    }
}

static inline float convert_back(int8_t x) { return x; }

template <class T>
static void dot_unpack_weight(const void* packed, int in, int out, float* weight) {
    typedef typename T::Number Number;
    const int groups = groups_of<T>(in);
    for (int panel = 0; panel < out; panel += NR) {
        const Number* from =
            (const Number*)((const int32_t*)((const char*)packed + panel / NR * panel_bytes(groups)) + NR);
        for (int g = 0; g < groups; g++)
            for (int n = panel; n < panel + NR; n++)
                for (int k = g * T::group; k < (g + 1) * T::group; k++, from++)
                    if (n < out && k < in) weight[(size_t)n * in + k] = convert_back(*from);
    }
}

template <class T>
static size_t dot_packed_rows_bytes(int rows, int in) {
    const int groups = groups_of<T>(in), depth = dot_depth(groups);
    return (size_t)((groups + depth - 1) / depth) * rows * DOT_DEPTH * sizeof(int32_t);
}

// Adding it rounds a number below 2²² to a whole one, in the lowest bits.
constexpr float ROUND = 12582912.0f;  // 1.5·2²³

// to[count] = the lowest bytes of the whole numbers that x · factor + offset rounds to.
static inline void to_bytes(const float* x, int count, float factor, float offset, uint8_t* to) {
    const float shift = ROUND + offset;
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtepi32_epi8((__m512i)(load(x + i) * factor + shift)));
#elif defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (; i + 32 <= count; i += 32) {
        __m256i v[4];
        for (int part = 0; part < 4; part++)
            v[part] = _mm256_and_si256((__m256i)(load(x + i + 8 * part) * factor + shift), _mm256_set1_epi32(255));
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
        _mm256_storeu_si256((__m256i*)(to + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
#endif
    for (; i < count; i++) to[i] = (uint8_t)bits(x[i] * factor + shift);
}

static inline RowScale row_scale(const float* x, int in) {
    VecInt most = {};
    int k = 0;
    for (; k + W <= in; k += W) {  // as whole numbers, among which NaN is the largest
        const VecInt v = (VecInt)absolute(load(x + k));
        most = v > most ? v : most;
    }
    int32_t largest = most_bits(x + k, in - k);
    for (int i = 0; i < W; i++) largest = larger(largest, most[i]);
    return row_scale_of(largest);
}

// to[count] = x as numbers of T, with zeros up to a whole group.
template <class T>
static inline void to_numbers(const float* x, int count, float factor, void* to) {
    typedef typename T::Number Number;
    if constexpr (is_int8<T>)
        to_bytes(x, count, factor, T::offset, (uint8_t*)to);
    else
        T::convert(x, count, (uint16_t*)to);
    for (int i = count; i % T::group; i++) ((Number*)to)[i] = 0;
}

template <class T>
static void dot_pack_rows(const void* source, bool, size_t stride, const int* index, int begin, int end, int rows,
                          int in, void* packed, float* row_scales) {
    const int groups = groups_of<T>(in), columns = dot_depth(groups) * T::group;
    for (int r = begin; r < end; r++) {
        const float* x = (const float*)source + (size_t)(index ? index[r] : r) * stride;
        float factor = 1;
        if (is_int8<T>) {
            const RowScale row = row_scale(x, in);
            row_scales[r] = row.scale, factor = row.inverse;
        }
        for (int k = 0, block = 0; k < in; k += columns, block++)
            to_numbers<T>(x + k, smaller(columns, in - k), factor,
                          (int32_t*)packed + ((size_t)block * rows + r) * DOT_DEPTH);
    }
}

// Sums that wait between blocks.
template <class T>
static size_t dot_scratch(int rows, int in, int) {
    return groups_of<T>(in) > DOT_DEPTH ? (size_t)rows * NR * sizeof(int32_t) : 0;
}

// What happens to W sums of a row.
template <class T, Epilogue E>
static inline void dot_finish(const Product& p, const int32_t* sums, int row, int column) {
    const Linear& w = *p.linear;  // bias and scale are padded to whole panels
    Vec v = to_float((typename T::Sum)load(sums));
    if (is_int8<T>) v = v * (p.row_scale[row] * load(w.scale + column));  // the sums times one of them could overflow
    v += load(w.bias + column);
    if (E == Epilogue::activate_pack || E == Epilogue::activate_store) v = activate(v, p.activation);
    if constexpr (E == Epilogue::activate_pack) {
        const int groups = groups_of<T>(w.out), depth = dot_depth(groups), group = column / T::group;
        int32_t* to = (int32_t*)p.out + ((size_t)(group / depth) * p.rows + row) * DOT_DEPTH + group % depth;
        float values[W];
        store(values, v);
        to_numbers<T>(values, smaller(W, w.out - column), 1.0f, to);
    } else {
        write<E>(p, v, row, column, (float*)p.out + (size_t)row * p.out_stride + column);
    }
}

// Where the sums of some rows go, and what is added to them: lines far apart, that would be waited for one by one.
template <Epilogue E>
static inline void prefetch_rows(const Product& p, int row, int rows, int column) {
    if (E == Epilogue::activate_pack) return;
    for (int r = row; r < row + rows; r++)
        for (int line = 0; line < NR; line += 16) {
            __builtin_prefetch((const float*)p.out + (size_t)r * p.out_stride + column + line, 1);
            if (E == Epilogue::residual) {
                const size_t other = p.residual_index ? p.residual_index[r] : r;
                __builtin_prefetch(p.residual + other * p.out_stride + column + line);
            }
        }
}

template <class T, Epilogue E>
static void dot_multiply_with(const Product& p) {
    const Linear& w = *p.linear;
    const int groups = groups_of<T>(w.in), depth = dot_depth(groups);
    const int step = even_step(p.rows, T::rows), steps = (p.rows + step - 1) / step;
    int32_t* waiting = (int32_t*)p.scratch;
    alignas(64) int32_t finished[T::rows * NR];
    for (int panel = p.first_panel; panel < p.last_panel; panel++) {
        const int32_t* first = (const int32_t*)((const char*)w.weight + panel * panel_bytes(groups));
        for (int k = 0; k < groups; k += depth) {
            const int count = smaller(depth, groups - k);
            const bool last = k + count == groups;
            const int32_t *block = first + (size_t)(1 + k) * NR, *next = block + (size_t)count * NR;
            const int32_t* a = (const int32_t*)p.packed_rows + (size_t)(k / depth) * p.rows * DOT_DEPTH;
            // The next block of weights, spread over this one's steps.
            const int slots = (count + PREFETCH_STEP - 1) / PREFETCH_STEP;
            const int ahead = last && panel + 1 == p.last_panel ? 0 : (count + 1) * NR * (int)sizeof(int32_t) / 64;
            const int lines = (ahead + steps * slots - 1) / (steps * slots);
            for (int r = 0, fetched = 0; r < p.rows; r += step, fetched += slots * lines) {
                const int rows = smaller(step, p.rows - r);
                if (last) prefetch_rows<E>(p, r, rows, panel * NR);
                DotTable<T, DOT_DEPTH, 1>::table[rows - 1](
                    {a + (size_t)r * DOT_DEPTH, block, count, k ? waiting + (size_t)r * NR : first, k ? (size_t)NR : 0,
                     last ? finished : waiting + (size_t)r * NR, (const char*)next + (size_t)fetched * 64,
                     fetched < ahead ? lines : 0});
                for (int i = 0; last && i < rows; i++)
                    for (int half = 0; half < NR && panel * NR + half < w.out; half += W)
                        dot_finish<T, E>(p, finished + i * NR + half, r + i, panel * NR + half);
            }
        }
    }
}

template <class T>
static void dot_multiply(const Product& p) {
    switch (p.epilogue) {
        case Epilogue::store:
        case Epilogue::store_float:
            return dot_multiply_with<T, Epilogue::store>(p);
        case Epilogue::activate_pack:
            if constexpr (!is_int8<T>) return dot_multiply_with<T, Epilogue::activate_pack>(p);
            return;
        case Epilogue::activate_store:
            return dot_multiply_with<T, Epilogue::activate_store>(p);
        case Epilogue::residual:
            return dot_multiply_with<T, Epilogue::residual>(p);
    }
}

template <class T>
static constexpr Kernels dot_table(const char* name, const char* description,
                                   size_t (*scratch)(int, int) = attention_scratch,
                                   void (*attention)(const Attention&) = attend) {
    return {name,
            description,
            NR,
            192,
            false,
            is_int8<T>,
            dot_fits<T>,
            dot_weight_bytes<T>,
            dot_pack_weight<T>,
            dot_unpack_weight<T>,
            dot_packed_rows_bytes<T>,
            dot_pack_rows<T>,
            dot_scratch<T>,
            dot_multiply<T>,
            scratch,
            attention,
            normalize,
            rotate<float>,
            gate<float>,
            embed,
            nothing,
            nothing};
}

}  // namespace TP_LEVEL
}  // namespace tp
