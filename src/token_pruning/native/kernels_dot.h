// Matrix products by instructions that multiply groups of narrow numbers and add them to 32-bit sums: four int8 to
// whole numbers, or two bfloat16 to float32. Everything else, and attention in float32, is that of kernels_vector.h.
// ARM's matrix instructions multiply groups of twice the size, of two rows and two columns at a time.
//
// An instruction set is a type T:
//     Number, group   what is multiplied, and how many of them make 32 bits, or 64 where rows are multiplied in pairs
//     Sum             W sums: VecInt or Vec
//     rows            rows whose sums fit the registers, with two vectors of columns
//     limit, offset   int8: the largest whole number of a weight; what is added to those of a row, ±127, when it is
//     packed add(s, a, b)    s + Σ a·b, group by group; a are numbers of a row, b of the weight
//     add_lane<L>(s, a, b)   NEON: the same with the group in lane L of a, for all of b
// In pairs, add() takes two groups each and gives the four sums of two rows, one after the other.
//
// Sums of int8 are exact: `limit` is such that add() never saturates, and 32 bits hold the sums of `fits`. A row's
// offset is taken back by what the sums begin with, -offset · Σ weights of the column, which is packed before a panel.
//
// The weight is cut into panels of NR = 2·W columns, stored [panel][NR first sums, then in / group][NR][group]. Rows
// are packed in blocks of at most DOT_DEPTH groups of input columns, stored [block][rows][DOT_DEPTH][group], so that a
// row's groups lie at compile-time offsets; in pairs, [block][rows / 2][DOT_DEPTH][2][group]. A panel's block (24 KiB
// with AVX-512) stays in the first-level cache while all rows pass by from the second; meanwhile the next is
// prefetched.
#include "kernels_vector.h"

namespace tp {
namespace TP_LEVEL {

#if defined(__AVX512VNNI__)
// int8, for every level that has 512-bit VNNI.
struct WideQuadruples {
    typedef int8_t Number;
    typedef VecInt Sum;
    static constexpr int group = 4, rows = 12, limit = 127, offset = 128;
    static VecInt add(VecInt sums, VecInt a, VecInt b) {
        return (VecInt)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
    }
};
#endif

constexpr int DOT_DEPTH = 192;  // groups; a multiple of W, so that no vector of packed numbers lies in two blocks

// Bytes of a group, and how many rows are multiplied at a time.
template <class T>
static constexpr int group_bytes = T::group * (int)sizeof(typename T::Number);
template <class T>
static constexpr int together = group_bytes<T> / 4;

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

// Where a row's group of input columns is packed.
template <class T>
static inline size_t packed_place(int group, int row, int rows, int depth) {
    const size_t before = group / depth * round_up(rows, together<T>) + row / together<T> * together<T>;
    return (before * DOT_DEPTH + group % depth * together<T> + row % together<T>)*group_bytes<T>;
}

// to[ROWS][NR] = from + rows[ROWS][depth groups] · panel[depth groups][NR]; rows of `from` are `from_stride` apart.
// Group (r, k) of the rows lies at r · ROW_STRIDE + k · COLUMN_STRIDE.
struct DotArguments {
    const void* rows;
    const void* panel;
    int depth;
    const int32_t* from;
    size_t from_stride;
    int32_t* to;
    const char* prefetch;
    int lines;
};

// sums += a group of each row · a row of groups of the panel.
template <class T, int ROWS, int ROW_STRIDE>
static inline void add_group(typename T::Sum (&sums)[ROWS][2], const int32_t* rows, const int32_t* panel) {
    const VecInt b0 = load(panel), b1 = load(panel + W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        const VecInt a = all(rows[r * ROW_STRIDE]);
        sums[r][0] = T::add(sums[r][0], a, b0);
        sums[r][1] = T::add(sums[r][1], a, b1);
    }
}

template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int ROWS>
static void dot_micro(const DotArguments& m) {
    typename T::Sum c[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        c[r][0] = (typename T::Sum)load(m.from + r * m.from_stride);
        c[r][1] = (typename T::Sum)load(m.from + r * m.from_stride + W);
    }
    const int32_t *rows = (const int32_t*)m.rows, *panel = (const int32_t*)m.panel;
    const char* prefetch = m.prefetch;
    int left = m.depth;
    do {
        for (int i = 0; i < m.lines; i++) __builtin_prefetch(prefetch + 64 * i, 0, 2);
        prefetch += 64 * m.lines;
#pragma GCC unroll 16
        for (int r = 0; PREFETCH_ROWS && COLUMN_STRIDE == 1 && r < ROWS; r++)
            __builtin_prefetch(rows + (ROWS + r) * ROW_STRIDE, 0, 3);
        int k = smaller(PREFETCH_STEP, left);
#if defined(TP_NEON)
        for (; COLUMN_STRIDE == 1 && k >= 4; k -= 4) {
            VecInt b[4][2];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, panel += NR) b[i][0] = load(panel), b[i][1] = load(panel + W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const VecInt a = load(rows + r * ROW_STRIDE);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    c[r][half] = T::template add_lane<0>(c[r][half], a, b[0][half]);
                    c[r][half] = T::template add_lane<1>(c[r][half], a, b[1][half]);
                    c[r][half] = T::template add_lane<2>(c[r][half], a, b[2][half]);
                    c[r][half] = T::template add_lane<3>(c[r][half], a, b[3][half]);
                }
            }
            rows += 4;
        }
#endif
        if (UNROLL > 1 && k == PREFETCH_STEP) {
#pragma GCC unroll UNROLL
            for (int i = 0; i < PREFETCH_STEP; i++, panel += NR, rows += COLUMN_STRIDE)
                add_group<T, ROWS, ROW_STRIDE>(c, rows, panel);
        } else {
            for (; k > 0; k--, panel += NR, rows += COLUMN_STRIDE) add_group<T, ROWS, ROW_STRIDE>(c, rows, panel);
        }
    } while ((left -= PREFETCH_STEP) > 0);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        store(m.to + r * NR, c[r][0]);
        store(m.to + r * NR + W, c[r][1]);
    }
}

#if defined(TP_NEON)
// Two rows' halves of four sums, and back.
template <class Sum>
static inline Sum lower(Sum a, Sum b) {
    return (Sum)vzip1q_s64((int64x2_t)a, (int64x2_t)b);
}
template <class Sum>
static inline Sum upper(Sum a, Sum b) {
    return (Sum)vzip2q_s64((int64x2_t)a, (int64x2_t)b);
}

// The same for PAIRS of rows.
template <class T, int PAIRS>
static void pair_micro(const DotArguments& m) {
    typedef typename T::Sum Sum;
    Sum c[PAIRS][NR / 2];  // of two rows and two columns
#pragma GCC unroll 16
    for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int32_t* from = m.from + 2 * p * m.from_stride + half * W;
            const Sum first = (Sum)load(from), second = (Sum)load(from + m.from_stride);
            c[p][2 * half] = lower(first, second), c[p][2 * half + 1] = upper(first, second);
        }
    const int32_t *rows = (const int32_t*)m.rows, *panel = (const int32_t*)m.panel;
    const char* prefetch = m.prefetch;
    for (int from = 0; from < m.depth; from += PREFETCH_STEP) {
        for (int i = 0; i < m.lines; i++) __builtin_prefetch(prefetch + 64 * i, 0, 2);
        prefetch += 64 * m.lines;
        for (int k = smaller(PREFETCH_STEP, m.depth - from); k > 0; k--) {
            const VecInt b[] = {load(panel), load(panel + W), load(panel + 2 * W), load(panel + 3 * W)};
#pragma GCC unroll 16
            for (int p = 0; p < PAIRS; p++) {
                const VecInt a = load(rows + p * DOT_DEPTH * W);
#pragma GCC unroll 4
                for (int i = 0; i < NR / 2; i++) c[p][i] = T::add(c[p][i], a, b[i]);
            }
            panel += 4 * W;
            rows += W;
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            int32_t* to = m.to + 2 * p * NR + half * W;
            store(to, lower(c[p][2 * half], c[p][2 * half + 1]));
            store(to + NR, upper(c[p][2 * half], c[p][2 * half + 1]));
        }
}
#endif

template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int ROWS>
static constexpr void (*dot_micro_for())(const DotArguments&) {
#if defined(TP_NEON)
    if constexpr (together<T> == 2)
        return pair_micro<T, ROWS>;
    else
#endif
        return dot_micro<T, ROW_STRIDE, COLUMN_STRIDE, ROWS>;
}
// For so many rows, or pairs of them.
template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int COUNT = T::rows / together<T>, int... ROWS>
struct DotTable : DotTable<T, ROW_STRIDE, COLUMN_STRIDE, COUNT - 1, COUNT, ROWS...> {};
template <class T, int ROW_STRIDE, int COLUMN_STRIDE, int... ROWS>
struct DotTable<T, ROW_STRIDE, COLUMN_STRIDE, 0, ROWS...> {
    static constexpr void (*table[])(const DotArguments&) = {dot_micro_for<T, ROW_STRIDE, COLUMN_STRIDE, ROWS>()...};
};

template <class T>
static constexpr bool is_int8 = sizeof(typename T::Number) == 1;

template <class T>
static bool dot_fits(int hidden, int inner, int) {
    return !is_int8<T> || (hidden <= 1 << 17 && inner <= 1 << 17);  // 127 · 127 · 2¹⁷ < 2³¹
}

template <class T>
static inline size_t panel_bytes(int groups) {
    return (sizeof(int32_t) + (size_t)groups * group_bytes<T>)*NR;
}

template <class T>
static size_t dot_weight_bytes(int in, int out) {
    return (out + NR - 1) / NR * panel_bytes<T>(groups_of<T>(in));
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
        int32_t* first = (int32_t*)((char*)packed + panel / NR * panel_bytes<T>(groups));
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
            (const Number*)((const int32_t*)((const char*)packed + panel / NR * panel_bytes<T>(groups)) + NR);
        for (int g = 0; g < groups; g++)
            for (int n = panel; n < panel + NR; n++)
                for (int k = g * T::group; k < (g + 1) * T::group; k++, from++)
                    if (n < out && k < in) weight[(size_t)n * in + k] = convert_back(*from);
    }
}

template <class T>
static size_t dot_packed_rows_bytes(int rows, int in) {
    const int groups = groups_of<T>(in), depth = dot_depth(groups);
    return (groups + depth - 1) / depth * round_up(rows, together<T>) * DOT_DEPTH * group_bytes<T>;
}

// Adding it rounds a number below 2²² to a whole one, in the lowest bits.
constexpr float ROUND = 12582912.0f;  // 1.5·2²³

// to[count] = the lowest bytes of the whole numbers that x · factor + offset rounds to.
template <class Source>
static inline void to_bytes(const Source* x, int count, float factor, float offset, uint8_t* to) {
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
#if defined(TP_NEON)
    for (; i + 16 <= count; i += 16) {
        uint16x8_t words[2];  // the lower halves of whole numbers
        for (int part = 0; part < 2; part++)
            words[part] = vuzp1q_u16((uint16x8_t)(load(x + i + 8 * part) * factor + shift),
                                     (uint16x8_t)(load(x + i + 8 * part + 4) * factor + shift));
        vst1q_u8(to + i, vuzp1q_u8((uint8x16_t)words[0], (uint8x16_t)words[1]));
    }
#endif
    for (; i < count; i++) to[i] = (uint8_t)bits(to_float(x[i]) * factor + shift);
}

template <class Source>
static inline RowScale row_scale(const Source* x, int in) {
    VecInt most = {};
    int k = 0;
#if defined(__AVX512BW__)
    if (sizeof(Source) == 2) {
        __m512i wide = _mm512_setzero_si512();
        for (; k + 2 * W <= in; k += 2 * W)
            wide = _mm512_max_epu16(wide, _mm512_and_si512(_mm512_loadu_si512(x + k), _mm512_set1_epi16(0x7fff)));
        const __m512i upper = _mm512_and_si512(wide, _mm512_set1_epi32((int)0xffff0000));
        most = (VecInt)_mm512_max_epi32(upper, _mm512_slli_epi32(wide, 16));
    }
#endif
    for (; k + W <= in; k += W) {  // as whole numbers, among which NaN is the largest
        const VecInt v = (VecInt)absolute(load(x + k));
        most = v > most ? v : most;
    }
    int32_t largest = most_bits(x + k, in - k);
    for (int i = 0; i < W; i++) largest = larger(largest, most[i]);
    return row_scale_of(largest);
}

// to[count] = x as numbers of T, with zeros up to a whole group.
template <class T, class Source>
static inline void to_numbers(const Source* x, int count, float factor, void* to) {
    typedef typename T::Number Number;
    if constexpr (is_int8<T>)
        to_bytes(x, count, factor, T::offset, (uint8_t*)to);
    else
        T::convert(x, count, (uint16_t*)to);
    for (int i = count; i % T::group; i++) ((Number*)to)[i] = 0;
}

template <class T, class Source>
static void pack_rows_of(const Source* source, size_t stride, const int* index, int begin, int end, int rows, int in,
                         void* packed, float* row_scales) {
    const int groups = groups_of<T>(in), columns = dot_depth(groups) * T::group;
    for (int r = begin; r < end; r++) {
        const Source* x = source + (size_t)(index ? index[r] : r) * stride;
        float factor = 1;
        if (is_int8<T>) {
            const RowScale row = row_scale(x, in);
            row_scales[r] = row.scale, factor = row.inverse;
        }
        for (int k = 0; k < in; k += columns) {
            const int count = smaller(columns, in - k), group = k / T::group;
            char* to = (char*)packed + packed_place<T>(group, r, rows, columns / T::group);
            if constexpr (together<T> == 1) {
                to_numbers<T>(x + k, count, factor, to);
            } else {  // every second group
                alignas(16) char numbers[DOT_DEPTH * group_bytes<T>];
                to_numbers<T>(x + k, count, factor, numbers);
                for (int i = 0; i < groups_of<T>(count) * group_bytes<T>; i += group_bytes<T>)
                    memcpy(to + together<T> * i, numbers + i, group_bytes<T>);
            }
        }
    }
}

template <class T, class Exchange>
static void dot_pack_rows(const void* source, bool half, size_t stride, const int* index, int begin, int end, int rows,
                          int in, void* packed, float* row_scales) {
    if (sizeof(Exchange) == 2 && half)
        pack_rows_of<T>((const Exchange*)source, stride, index, begin, end, rows, in, packed, row_scales);
    else
        pack_rows_of<T>((const float*)source, stride, index, begin, end, rows, in, packed, row_scales);
}

// Sums that wait between blocks.
template <class T>
static size_t dot_scratch(int rows, int in, int) {
    return groups_of<T>(in) > DOT_DEPTH ? round_up(rows, together<T>) * NR * sizeof(int32_t) : 0;
}

// Finished sums of a row go where they belong, as Numbers.
template <class T, Epilogue E, class Number>
static inline void dot_write(const Product& p, Vec first, Vec second, int row, int column) {
    if constexpr (E == Epilogue::activate_pack) {
        static_assert(together<T> == 1 || T::group == W);
        const Vec both[] = {first, second};
        for (int half = 0; half < NR && column + half < p.linear->out; half += W) {
            alignas(64) float values[W];
            store(values, both[half / W]);
            const int depth = dot_depth(groups_of<T>(p.linear->out));
            to_numbers<T>(values, smaller(W, p.linear->out - column - half), 1.0f,
                          (char*)p.out + packed_place<T>((column + half) / T::group, row, p.rows, depth));
        }
    } else {
        write(p, first, second, column, place<E, Number>(p, row, column));
    }
}

// What happens to a panel's sums of some rows.
template <class T, Epilogue E, class Number>
static inline void dot_finish(const Product& p, const int32_t* sums, int row, int rows, int column) {
    const Linear& w = *p.linear;  // bias and scale are padded to whole panels
    auto scaled = [&](int r, int half) {
        Vec v = to_float((typename T::Sum)load(sums + r * NR + half));
        // The sums times one of the scales could overflow.
        if (is_int8<T>) v = v * (p.row_scale[row + r] * load(w.scale + column + half));
        return v + load(w.bias + column + half);
    };
    auto put_rows = [&](auto activate) {
        for (int r = 0; r < rows; r++)
            dot_write<T, E, Number>(p, activate(scaled(r, 0)), activate(scaled(r, W)), row + r, column);
    };
    if constexpr (E == Epilogue::residual) {
        alignas(64) float values[T::rows * NR];
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < NR; half += W)
                store(values + r * NR + half, with_residual(p, scaled(r, half), row + r, column + half));
        for (int r = 0; r < rows; r++)
            dot_write<T, E, Number>(p, load(values + r * NR), load(values + r * NR + W), row + r, column);
    } else if constexpr (activates<E>) {
        with_activation<E == Epilogue::activate_pack || sizeof(Number) == 2>(p.activation, put_rows);
    } else {
        put_rows([](Vec v) { return v; });
    }
}

template <class T, Epilogue E, class Number = float>
static void dot_multiply_with(const Product& p) {
    const Linear& w = *p.linear;
    const int groups = groups_of<T>(w.in), depth = dot_depth(groups);
    const int step = (int)round_up(even_step(p.rows, T::rows), together<T>), steps = (p.rows + step - 1) / step;
    int32_t* waiting = (int32_t*)p.scratch;
    alignas(64) int32_t finished[T::rows * NR];
    for (int panel = p.first_panel; panel < p.last_panel; panel++) {
        const int32_t* first = (const int32_t*)((const char*)w.weight + panel * panel_bytes<T>(groups));
        for (int k = 0; k < groups; k += depth) {
            const int count = smaller(depth, groups - k);
            const bool last = k + count == groups;
            const char* block = (const char*)(first + NR) + (size_t)k * NR * group_bytes<T>;
            const char* next = block + (size_t)count * NR * group_bytes<T>;
            const char* a = (const char*)p.packed_rows + packed_place<T>(k, 0, p.rows, depth);
            // The next block of weights, spread over this one's steps.
            const int slots = (count + PREFETCH_STEP - 1) / PREFETCH_STEP;
            const int ahead = last && panel + 1 == p.last_panel ? 0 : (int)panel_bytes<T>(count) / 64;
            const int lines = (ahead + steps * slots - 1) / (steps * slots);
            for (int r = 0, fetched = 0; r < p.rows; r += step, fetched += slots * lines) {
                const int rows = smaller(step, p.rows - r);
                if (last && E != Epilogue::activate_pack) prefetch_rows<E, Number>(p, r, rows, panel * NR);
                DotTable<T, DOT_DEPTH, 1>::table[(rows - 1) / together<T>](
                    {a + (size_t)r * DOT_DEPTH * group_bytes<T>, block, count, k ? waiting + (size_t)r * NR : first,
                     k ? (size_t)NR : 0, last ? finished : waiting + (size_t)r * NR, next + (size_t)fetched * 64,
                     fetched < ahead ? lines : 0});
                if (last) dot_finish<T, E, Number>(p, finished, r, rows, panel * NR);
            }
        }
    }
}

template <class T, class Exchange>
static void dot_multiply(const Product& p) {
    switch (p.epilogue) {
        case Epilogue::store:
            return dot_multiply_with<T, Epilogue::store, Exchange>(p);
        case Epilogue::store_float:
            return dot_multiply_with<T, Epilogue::store>(p);
        case Epilogue::activate_pack:
            if constexpr (!is_int8<T>) return dot_multiply_with<T, Epilogue::activate_pack>(p);
            return;
        case Epilogue::activate_store:
            return dot_multiply_with<T, Epilogue::activate_store, Exchange>(p);
        case Epilogue::residual:
            return dot_multiply_with<T, Epilogue::residual>(p);
    }
}

template <class T, class Exchange = float>
static constexpr Kernels dot_table(const char* name, const char* description,
                                   size_t (*scratch)(int, int) = attention_scratch,
                                   void (*attention)(const Attention&) = attend) {
    return {name,
            description,
            NR,
            96,  // of int8, float32 numbers wait between the two products of a feed-forward block: in L2, not L3
            sizeof(Exchange) == 2,
            is_int8<T>,
            false,
            dot_fits<T>,
            dot_weight_bytes<T>,
            dot_pack_weight<T>,
            dot_unpack_weight<T>,
            dot_packed_rows_bytes<T>,
            dot_pack_rows<T, Exchange>,
            dot_scratch<T>,
            dot_multiply<T, Exchange>,
            scratch,
            attention,
            normalize,
            rotate<Exchange>,
            gate<Exchange>,
            embed,
            nothing,
            nothing};
}

}  // namespace TP_LEVEL
}  // namespace tp
