// bfloat16 products by AVX-512 BF16; int8 products by AVX-512 VNNI, which all processors with the former have; and
// attention in bfloat16 for both. Between the products rows are bfloat16.
//
// Attention is that of kernels_vector.h, with pairs of numbers in place of single ones: scores are products of pairs of
// a head's columns, contexts of pairs of keys. Maxima, exponentials and sums are float32.
#define TP_LEVEL avx512_bf16
#include "kernels_dot.h"

namespace tp {
namespace avx512_bf16 {

struct Pairs {
    typedef uint16_t Number;
    typedef Vec Sum;
    static constexpr int group = 2, rows = 12, limit = 0, offset = 0;
    static Vec add(Vec sums, VecInt a, VecInt b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
    }
    static void convert(const float* x, int count, uint16_t* to) {
        int i = 0;
        for (; i + W <= count; i += W) store(to + i, load(x + i));
        for (; i < count; i++) to[i] = to_half(x[i]);
    }
    static void convert(const uint16_t* x, int count, uint16_t* to) {
        int i = 0;
        for (; i + NR <= count; i += NR) _mm512_storeu_si512(to + i, _mm512_loadu_si512(x + i));
        for (; i < count; i++) to[i] = x[i];
    }
};

constexpr float LOG2_E = 1.44269504f;  // probabilities are powers of two
constexpr int HEAD = 64;               // groups of a head in a block of keys

static constexpr InterleaveIndex<NR> of_rows;  // of two vectors, a row each
static constexpr InterleaveIndex<W> of_one;    // of a vector with W numbers of either row

// Two rows of numbers as one of pairs.
static inline VecInt paired(Vec first, Vec second) {
    const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (VecInt)_mm512_permutexvar_epi16(_mm512_load_si512(of_one.low), numbers);
}

struct Scratch {
    int32_t* keys;           // [blocks of the head][keys][HEAD]
    int32_t* values;         // [head / NR][pairs of keys][NR]
    int32_t* queries;        // [pairs of the head][NR]
    float* scores;           // [keys, even][NR]
    int32_t* probabilities;  // [pairs of keys][NR]
    int32_t* zero;           // [NR]
    float* context;          // [rows][NR]
    float* received;         // [keys][W]
};

static size_t lay_out(Scratch& s, char* base, int keys, int head_size) {
    const size_t head_pairs = (head_size + 1) / 2, key_pairs = (keys + 1) / 2;
    size_t at = 0;
    auto take = [&](size_t count) {
        char* place = base + at;
        at += round_up(count * 4, 64);
        return place;
    };
    s.keys = (int32_t*)take((head_pairs + HEAD - 1) / HEAD * keys * HEAD);
    s.values = (int32_t*)take(round_up(head_size, NR) * key_pairs);
    s.queries = (int32_t*)take(head_pairs * NR);
    s.scores = (float*)take(2 * key_pairs * NR);
    s.probabilities = (int32_t*)take(key_pairs * NR);
    s.zero = (int32_t*)take(NR);
    s.context = (float*)take((size_t)Pairs::rows * NR);
    s.received = (float*)take((size_t)keys * W);
    return at;
}

// The first `count` numbers of a vector, or all.
static inline __mmask32 first_of(int count) { return count < NR ? (1u << count) - 1 : ~0u; }

// to[pair of columns][NR] of `rows` ≤ NR rows; the others are zero.
static void transpose_pairs(const uint16_t* from, size_t stride, int rows, int columns, int32_t* to) {
    for (int d = 0; d < columns; d += NR)
        for (int half = 0; half < NR; half += W) {
            Vec x[W];
            for (int r = 0; r < W; r++) {
                const __mmask32 there = half + r < rows ? first_of(columns - d) : 0;
                x[r] = (Vec)_mm512_maskz_loadu_epi16(there, from + (half + r) * stride + d);
            }
            transpose(x);
            for (int i = 0; i < smaller(W, (columns - d + 1) / 2); i++)
                store(to + (size_t)(d / 2 + i) * NR + half, (VecInt)x[i]);
        }
}

static size_t half_attention_scratch(int keys, int head_size) {
    Scratch s;
    return lay_out(s, nullptr, keys, head_size);
}

template <bool TERMS>
static void half_attend_with(const Attention& a) {
    const int n = a.keys, size = a.head_size, head_pairs = (size + 1) / 2, key_pairs = (n + 1) / 2;
    Scratch s;
    lay_out(s, (char*)a.scratch, n, size);
    const uint16_t *query = (const uint16_t*)a.query, *key = (const uint16_t*)a.key, *value = (const uint16_t*)a.value;
    for (int d = 0; d < size; d += 2 * HEAD)
        for (int j = 0; j < n; j++)
            to_numbers<Pairs>(key + j * a.stride + d, smaller(2 * HEAD, size - d), 1,
                              s.keys + ((size_t)d / (2 * HEAD) * n + j) * HEAD);
    for (int j = 0; j < n; j += 2)
        for (int d = 0; d < size; d += NR) {
            const __mmask32 columns = first_of(size - d);
            const uint16_t* even = value + j * a.stride + d;
            const __m512i first = _mm512_maskz_loadu_epi16(columns, even);
            const __m512i second = _mm512_maskz_loadu_epi16(j + 1 < n ? columns : 0, even + a.stride);
            int32_t* to = s.values + ((size_t)(d / NR) * key_pairs + j / 2) * NR;
            store(to, (VecInt)_mm512_permutex2var_epi16(first, _mm512_load_si512(of_rows.low), second));
            store(to + W, (VecInt)_mm512_permutex2var_epi16(first, _mm512_load_si512(of_rows.high), second));
        }
    for (int i = 0; i < NR; i++) s.zero[i] = 0;
    for (int j = 0; a.received && j < n; j++) store(s.received + j * W, Vec{});

    int begin = 0, end = n;  // the keys that are read, from the first of a pair on
    for (int first = 0; first < a.queries; first += NR) {
        const int count = smaller(NR, a.queries - first);
        transpose_pairs(query + (size_t)first * a.query_stride, a.query_stride, count, size, s.queries);
        if (TERMS && a.terms.window >= 0) {
            const int *places = a.terms.key_places, *asking = a.terms.query_places + first;
            while (begin < n && places[begin] < asking[0] - a.terms.window) begin++;
            begin -= begin % 2;
            for (end = begin; end < n && places[end] <= asking[count - 1] + a.terms.window;) end++;
        }
        const int key_step = even_step(end - begin, Pairs::rows);
        for (int d = 0; d < head_pairs; d += HEAD)
            for (int j = begin; j < end; j += key_step) {
                int32_t* to = (int32_t*)s.scores + (size_t)j * NR;
                DotTable<Pairs, HEAD, 1>::table[smaller(key_step, end - j) - 1](
                    {s.keys + ((size_t)d / HEAD * n + j) * HEAD, s.queries + (size_t)d * NR,
                     smaller(HEAD, head_pairs - d), d ? to : s.zero, d ? (size_t)NR : 0, to, nullptr, 0});
            }
        float scale = a.scale;  // of scores
        if (TERMS) {
            for (int j = begin; j < end; j++)
                for (int half = 0; half < NR; half += W) {
                    float* x = s.scores + (size_t)j * NR + half;
                    store(x, load(x) * scale);
                }
            add_terms(a.terms, first, count, begin, end, s.scores);
            scale = 1;
        }
        const Vec factor = all(scale * LOG2_E);
        float inverse[NR];
        for (int half = 0; half < NR; half += W) {
            float* column = s.scores + half;
            VecInt there;  // all bits of the columns that have a query; others may hold NaN, which no zero would undo
            for (int i = 0; i < W; i++) there[i] = half + i < count ? -1 : 0;
            Vec most = load(column + (size_t)begin * NR), total = Vec{};
            for (int j = begin + 1; j < end; j++) most = maximum(most, load(column + (size_t)j * NR));
            const Vec top = most * factor;
            auto weight = [&](int key) {  // a NaN that `most` has lost makes the total NaN all the same
                const Vec x = load(column + (size_t)key * NR);
                VecInt counts = there;
                if (TERMS) counts &= x != OUTSIDE;
                return (Vec)((VecInt)power_of_two(_mm512_fmsub_ps((__m512)x, (__m512)factor, (__m512)top)) & counts);
            };
            for (int j = begin; j < end; j += 2) {
                const Vec e0 = weight(j), e1 = j + 1 < end ? weight(j + 1) : Vec{};
                total += e0 + e1;
                store(s.probabilities + (size_t)(j / 2) * NR + half, paired(e0, e1));
                if (a.received) store(column + (size_t)j * NR, e0), store(column + (size_t)(j + 1) * NR, e1);
            }
            store(inverse + half, 1.0f / total);
            for (int i = larger(0, count - half); i < W; i++) inverse[half + i] = 0;  // no query is there
            const Vec share = load(inverse + half);
            for (int j = begin; a.received && j < end; j++)
                store(s.received + j * W, load(s.received + j * W) + load(column + (size_t)j * NR) * share);
        }
        const int step = even_step(count, Pairs::rows);
        for (int d = 0; d < size; d += NR)
            for (int r = 0; r < count; r += step) {
                const int rows = smaller(step, count - r);
                DotTable<Pairs, 1, NR>::table[rows - 1]({s.probabilities + (size_t)(begin / 2) * NR + r,
                                                         s.values + ((size_t)(d / NR) * key_pairs + begin / 2) * NR,
                                                         (end - begin + 1) / 2, s.zero, 0, (int32_t*)s.context, nullptr,
                                                         0});
                for (int i = 0; i < rows; i++) {
                    uint16_t* to = (uint16_t*)a.context + (size_t)(first + r + i) * a.context_stride + d;
                    const float* from = s.context + i * NR;
                    const Vec low = load(from) * inverse[r + i], high = load(from + W) * inverse[r + i];
                    const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                    _mm512_mask_storeu_epi16(to, first_of(size - d), numbers);
                }
            }
    }
    for (int j = 0; a.received && j < n; j++) a.received[j] = sum(load(s.received + j * W));
}

static void half_attend(const Attention& a) {
    if (a.terms.any())
        half_attend_with<true>(a);
    else
        half_attend_with<false>(a);
}

}  // namespace avx512_bf16

const Kernels* avx512_bf16_kernels(Dtype dtype) {
    using namespace avx512_bf16;
    static const Kernels bfloat16 = dot_table<Pairs, uint16_t>(
        "avx512_bf16", "bfloat16 products and attention by AVX-512 BF16", half_attention_scratch, half_attend);
    static const Kernels int8 = dot_table<WideQuadruples, uint16_t>(
        "avx512_bf16", "int8 products by AVX-512 VNNI, attention by AVX-512 BF16", half_attention_scratch, half_attend);
    return dtype == Dtype::bfloat16 ? &bfloat16 : dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
