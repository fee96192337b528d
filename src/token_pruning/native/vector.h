// Vectors of float32 in one width per instruction set, by the compiler's vector extension, and the elementwise
// functions every level shares. Included by every kernel file, inside the level's own namespace: the same inline
// function compiled for two instruction sets must not be one symbol. For the same reason nothing here uses the
// standard library's templates.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(TP_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace tp {
namespace TP_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t VecInt __attribute__((vector_size(4 * W)));
typedef uint32_t VecWord __attribute__((vector_size(4 * W)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * W)));

static inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
static inline Vec all(float x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(x);
#else
    return Vec{x, x, x, x};
#endif
}
static inline Vec load(const uint16_t* p) {  // bfloat16 is the upper half of a float32
    VecHalf h;
    memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, VecWord) << 16);
}
static inline float to_float(uint16_t h) {
    uint32_t word = (uint32_t)h << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}
static inline uint32_t bits(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}
static inline uint16_t to_half(float x) {  // to nearest, ties to even
    const uint32_t word = bits(x);
    if ((word & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(word >> 16 | 0x40);  // rounding could make it infinite, or 0
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
static inline float to_float(float x) { return x; }
static inline void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    float parts[W];
    store(parts, v);
    for (int i = 0; i < W; i++) p[i] = to_half(parts[i]);
#endif
}
// Two vectors side by side.
static inline void store(float* p, Vec first, Vec second) { store(p, first), store(p + W, second); }
static inline void store(uint16_t* p, Vec first, Vec second) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    store(p, first), store(p + W, second);
#endif
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(uint16_t* p, float x) { *p = to_half(x); }

// table[index[0]] table[index[1]] …
static inline Vec gather(const float* table, VecInt index) {
#if defined(__AVX512F__)
    return (Vec)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (Vec)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    Vec v;
    for (int i = 0; i < W; i++) v[i] = table[index[i]];
    return v;
#endif
}

static inline VecInt gather(const int32_t* table, VecInt index) {
#if defined(__AVX512F__)
    return (VecInt)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (VecInt)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
    VecInt v;
    for (int i = 0; i < W; i++) v[i] = table[index[i]];
    return v;
#endif
}

static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int larger(int a, int b) { return a > b ? a : b; }

// Where one is NaN, it is b: what may be NaN and must not be lost comes second.
static inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
static inline Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
static inline Vec absolute(Vec x) { return (Vec)((VecInt)x & 0x7fffffff); }

// The lower, or upper, halves of two vectors in turn: a₀ b₀ a₁ b₁ …
template <int OFFSET>
static inline Vec interleave(Vec a, Vec b) {
#if defined(__clang__)  // which makes one instruction of it
    Vec both;
    for (int i = 0; i < W; i++) both[i] = (i % 2 ? b : a)[i / 2 + OFFSET];
    return both;
#else
    VecInt mask;
    for (int i = 0; i < W; i++) mask[i] = i / 2 + OFFSET + i % 2 * W;
    return __builtin_shuffle(a, b, mask);
#endif
}

// A square of numbers, turned over its diagonal.
static inline void transpose(Vec* x) {
    Vec y[W];
    for (int width = W; width > 1; width /= 2) {
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = interleave<0>(x[i], x[i + W / 2]);
            y[2 * i + 1] = interleave<W / 2>(x[i], x[i + W / 2]);
        }
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

static inline float sum(Vec v) {
    float parts[W];
    store(parts, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}
// int8: what a row of numbers is divided by so that the largest becomes 127.
struct RowScale {
    float scale, inverse;
};
// From the largest number's bits without its sign, which rise with it, infinity and NaN above all. A row that has one
// of these is NaN as a whole; one whose numbers are all below 1e-35, where 127 / largest would overflow, is zero.
static inline RowScale row_scale_of(int32_t most_bits) {
    float most;
    memcpy(&most, &most_bits, 4);
    if (most_bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
    return most >= 1e-35f ? RowScale{most / 127.0f, 127.0f / most} : RowScale{1.0f, 1.0f};
}
template <class Number>
static inline int32_t most_bits(const Number* x, int count) {
    int32_t most = 0;
    for (int k = 0; k < count; k++) most = larger(most, (int32_t)(bits(to_float(x[k])) & 0x7fffffff));
    return most;
}
// A row of a weight matrix as whole numbers: what its numbers are divided by, and the scale of its sums.
struct WeightRow {
    float divisor, scale;
    float whole(float x) const { return divisor == 0 ? 0.0f : __builtin_rintf(x / divisor); }
};
// For whole numbers of at most `limit`. Where a scale is `given`, the row is whole numbers already: they stay as they
// are, unless they come from a level with a higher limit.
static inline WeightRow weight_row(const float* row, int in, float limit, const float* given) {
    const int32_t word = most_bits(row, in);
    float most;
    memcpy(&most, &word, 4);
    if (given && most <= limit) return {1.0f, *given};
    const float scale = given ? *given : 1.0f;
    if (word >= 0x7f800000) return {0.0f, __builtin_nanf("")};
    return most >= 1e-35f ? WeightRow{most / limit, most / limit * scale} : WeightRow{1.0f, scale};
}

// eˣ for x ≤ 88, relative error 2e-7; below -87 it is (nearly) zero. NaN for NaN and infinity.
static inline Vec exponential(Vec x) {
    const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer
    x = maximum(all(-87.0f), x);
    Vec shifted = x * 1.44269504f + magic, rounded = shifted - magic;
    Vec f = (x - rounded * 0.693359375f) - rounded * -2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = (p * f) * f + f + 1.0f;
    VecWord power = ((VecWord)shifted + 127) << 23;  // the lowest bits of `shifted` are the integer
    return p * (Vec)power;
}

#if defined(__AVX512F__)

// 2ᵗ, relative error 1e-4: its result is rounded to bfloat16.
static inline __m512 power_of_two(__m512 t) {
    __m512 f = _mm512_reduce_ps(t, 0);  // t − round(t), in [-½, ½]
    __m512 p = _mm512_set1_ps(5.5171743e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4266163e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9326098e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9992526e-1f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(t, f));
}

// For permutations that pick numbers of 16 bits from two rows a, b, the second of which lies APART behind the first:
// a₀ b₀ a₁ b₁ … a₁₅ b₁₅, and a₁₆ b₁₆ … a₃₁ b₃₁.
template <int APART>
struct alignas(64) InterleaveIndex {
    uint16_t low[32] = {}, high[32] = {};
    constexpr InterleaveIndex() {
        for (int i = 0; i < 32; i++) {
            low[i] = (uint16_t)(i / 2 + (i % 2) * APART);
            high[i] = (uint16_t)(16 + low[i]);
        }
    }
};

// Φ, the normal distribution function, on [-LIMIT, LIMIT) as 32 polynomials; below it is 0, above 1.
template <int DEGREE, int LIMIT_TENTHS>
struct alignas(64) NormalTable {
    static constexpr float limit = LIMIT_TENTHS / 10.0f, step = 2 * limit / 32;
    float coefficient[DEGREE + 1][32];

    // Made on first use, never while the library is being loaded, perhaps on a processor without these instructions.
    static const NormalTable& get() {
        static const NormalTable table;
        return table;
    }
    __m512 at(__m512 x) const {
        __m512 t = _mm512_fmadd_ps(x, _mm512_set1_ps(1 / step), _mm512_set1_ps(16.0f));
        t = _mm512_min_ps(_mm512_set1_ps(31.99999f), _mm512_max_ps(_mm512_setzero_ps(), t));  // NaN stays
        const __m512i segment = _mm512_cvttps_epi32(t);
        const __m512 f = _mm512_reduce_ps(t, 1);  // t − ⌊t⌋
        __m512 value = pick(DEGREE, segment);
        for (int k = DEGREE - 1; k >= 0; k--) value = _mm512_fmadd_ps(value, f, pick(k, segment));
        return value;
    }

private:
    NormalTable() {
        for (int i = 0; i < 32; i++) {  // interpolation at Chebyshev nodes: divided differences, then powers
            double node[DEGREE + 1], difference[DEGREE + 1], power[DEGREE + 1] = {};
            for (int j = 0; j <= DEGREE; j++) {
                node[j] = 0.5 - 0.5 * cos((2 * j + 1) * 3.14159265358979323846 / (2 * DEGREE + 2));
                difference[j] = 0.5 * erfc((limit - (i + node[j]) * step) / sqrt(2.0));
            }
            for (int order = 1; order <= DEGREE; order++)
                for (int j = DEGREE; j >= order; j--)
                    difference[j] = (difference[j] - difference[j - 1]) / (node[j] - node[j - order]);
            for (int j = DEGREE; j >= 0; j--) {
                for (int k = DEGREE; k > 0; k--) power[k] = power[k - 1] - power[k] * node[j];
                power[0] = difference[j] - power[0] * node[j];
            }
            for (int k = 0; k <= DEGREE; k++) coefficient[k][i] = (float)power[k];
        }
        for (int k = 0; k <= DEGREE; k++) coefficient[k][0] = coefficient[k][31] = 0;
        coefficient[0][31] = 1;
    }
    __m512 pick(int k, __m512i segment) const {
        return _mm512_permutex2var_ps(_mm512_load_ps(coefficient[k]), segment, _mm512_load_ps(coefficient[k] + 16));
    }
};

typedef NormalTable<2, 50> RoughNormal;
typedef NormalTable<4, 56> ExactNormal;

// x·Φ(x), absolute error 2e-7 times |x|; ROUGH: 4e-5, an order below that of bfloat16.
template <bool ROUGH>
static inline Vec gelu(Vec x) {
    return x * (Vec)(ROUGH ? RoughNormal::get().at((__m512)x) : ExactNormal::get().at((__m512)x));
}

#else

// x·Φ(x), absolute error 3e-7 times |x|: erf as the quotient of polynomials that Eigen and XLA use, which is ±1 at ±4.
template <bool>
static inline Vec gelu(Vec x) {
    const Vec z = minimum(all(4.0f), maximum(all(-4.0f), x * 0.70710678f)), square = z * z;
    Vec p = all(-2.72614225801306e-10f);
    p = p * square + 2.77068142495902e-08f;
    p = p * square - 2.10102402082508e-06f;
    p = p * square - 5.69250639462346e-05f;
    p = p * square - 7.34990630326855e-04f;
    p = p * square - 2.95459980854025e-03f;
    p = p * square - 1.60960333262415e-02f;
    Vec q = all(-1.45660718464996e-05f);
    q = q * square - 2.13374055278905e-04f;
    q = q * square - 1.68282697438203e-03f;
    q = q * square - 7.37332916720468e-03f;
    q = q * square - 1.42647390514189e-02f;
    return x * 0.5f * (z * p / q + 1.0f);
}

#endif

// x·σ(u), where x σ(u) is nearly 0 for u below −80.
static inline Vec times_sigmoid(Vec x, Vec u) {
    Vec small = -u > 80.0f ? all(80.0f) : -u;
    return (-u > 80.0f ? x * 0.0f : x) / (exponential(small) + 1.0f);
}

// x·σ(2√(2/π)(x + 0.044715x³)), BERT's original approximation of gelu.
static inline Vec gelu_tanh(Vec x) { return times_sigmoid(x, x * 1.5957691216f * (x * x * 0.044715f + 1.0f)); }

// use(f) with the activation's f, which may be ROUGH where its results become bfloat16. Around a loop, it keeps f's
// numbers in registers from vector to vector.
template <bool ROUGH = false, class Use>
static inline void with_activation(Activation activation, Use use) {
    switch (activation) {
        case Activation::gelu:
            return use([](Vec x) { return gelu<ROUGH>(x); });
        case Activation::relu:
            return use([](Vec x) { return maximum(Vec{}, x); });
        case Activation::gelu_tanh:
            return use([](Vec x) { return gelu_tanh(x); });
        case Activation::silu:
            return use([](Vec x) { return times_sigmoid(x, x); });
    }
}

static inline Vec activate(Vec x, Activation activation) {
    with_activation(activation, [&](auto function) { x = function(x); });
    return x;
}

// table[index[0]] table[index[1]] … for indexes from `low` to `high`. Numbers that lie close together are not gathered,
// but read as a whole, up to DISTANCE_EDGE from `low` on, which is faster.
template <class Number>
static inline auto pick(const Number* table, VecInt index, [[maybe_unused]] int low, [[maybe_unused]] int high) {
    typedef decltype(gather(table, index)) Result;
#if defined(__AVX512F__)
    const float* from = (const float*)table + low;
    if (high - low < W) return (Result)_mm512_permutexvar_ps((__m512i)(index - low), (__m512)load(from));
    if (high - low < 2 * W)
        return (Result)_mm512_permutex2var_ps((__m512)load(from), (__m512i)(index - low), (__m512)load(from + W));
#elif defined(__AVX2__)
    const float* from = (const float*)table + low;
    if (high - low < W) return (Result)_mm256_permutevar8x32_ps((__m256)load(from), (__m256i)(index - low));
#endif
    return (Result)gather(table, index);
}

// A row's numbers for some distances from `low` to `high`.
static inline Vec pick(const DistanceTerms& terms, const float* row, VecInt distance, int low, int high) {
    const int far = terms.far;
    distance = distance > far ? VecInt{} + far : distance;
    distance = (distance < -far ? VecInt{} - far : distance) + far;
    low = larger(-far, smaller(low, far)) + far, high = larger(-far, smaller(high, far)) + far;
    const VecInt column = pick(terms.columns, distance, low, high);
    return pick(row, column, terms.columns[low], terms.columns[high]);
}

// to[a][b] = by_row[a][column] + by_lane[b][column] for rows a and lanes b, W of each at most. The column is that of
// their distance: of a from b where SIGN is 1, and of b from a where it is -1.
template <int SIGN>
static inline void distance_block(const DistanceTerms& terms, const int* row_places, int rows, const float* by_row,
                                  const int* lane_places, int lanes, const float* by_lane, Vec* to) {
    VecInt row_place, lane_place;
    for (int i = 0; i < W; i++) {
        row_place[i] = row_places[smaller(i, rows - 1)];
        lane_place[i] = lane_places[smaller(i, lanes - 1)];
    }
    const int first_row = row_places[0], last_row = row_places[rows - 1];
    const int first_lane = lane_places[0], last_lane = lane_places[lanes - 1];
    for (int b = 0; b < W; b++) to[b] = Vec{};
    if (by_lane) {
        for (int b = 0; b < lanes; b++) {
            const int place = lane_places[b];
            const int low = SIGN > 0 ? first_row - place : place - last_row;
            to[b] =
                pick(terms, by_lane + b * terms.stride, (row_place - place) * SIGN, low, low + last_row - first_row);
        }
        transpose(to);
    }
    for (int a = 0; by_row && a < rows; a++) {
        const int place = row_places[a];
        const int low = SIGN > 0 ? place - last_lane : first_lane - place;
        to[a] += pick(terms, by_row + a * terms.stride, (place - lane_place) * SIGN, low, low + last_lane - first_lane);
    }
}

// Both norms: what RMS norm leaves out is the mean.
template <bool RMS>
static void normalize_rows(const float* in, float* out, int begin, int end, int size, const float* gamma,
                           const float* beta, float epsilon) {
    int whole = size / W * W;
    for (int row = begin; row < end; row++) {
        const float* x = in + (size_t)row * size;
        float* y = out + (size_t)row * size;
        Vec total = Vec{}, squares = Vec{};
        float rest = 0, rest_squares = 0;
        for (int i = 0; !RMS && i < whole; i += W) total += load(x + i);
        for (int i = whole; !RMS && i < size; i++) rest += x[i];
        const float mean = RMS ? 0.0f : (sum(total) + rest) / size;
        for (int i = 0; i < whole; i += W) {
            Vec d = load(x + i) - mean;
            squares += d * d;
        }
        for (int i = whole; i < size; i++) rest_squares += (x[i] - mean) * (x[i] - mean);
        float inverse = 1.0f / __builtin_sqrtf((sum(squares) + rest_squares) / size + epsilon);
        for (int i = 0; i < whole; i += W)
            store(y + i, (load(x + i) - mean) * inverse * load(gamma + i) + load(beta + i));
        for (int i = whole; i < size; i++) y[i] = (x[i] - mean) * inverse * gamma[i] + beta[i];
    }
}

static void normalize(const float* in, float* out, int begin, int end, int size, const float* gamma, const float* beta,
                      float epsilon, bool rms) {
    if (rms)
        normalize_rows<true>(in, out, begin, end, size, gamma, beta, epsilon);
    else
        normalize_rows<false>(in, out, begin, end, size, gamma, beta, epsilon);
}

template <class Exchange>
static void rotate(void* rows, size_t stride, int begin, int end, int heads, int head_size, const float* angles,
                   const int* index) {
    const int half = head_size / 2, whole = half / W * W;
    for (int r = begin; r < end; r++) {
        const float *cosine = angles + (size_t)index[r] * head_size, *sine = cosine + half;
        Exchange* x = (Exchange*)rows + (size_t)r * stride;
        for (int head = 0; head < heads; head++, x += head_size) {
            for (int i = 0; i < whole; i += W) {
                const Vec a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
                store(x + i, a * c - b * s);
                store(x + half + i, b * c + a * s);
            }
            for (int i = whole; i < half; i++) {
                const float a = to_float(x[i]), b = to_float(x[half + i]);
                put(x + i, a * cosine[i] - b * sine[i]);
                put(x + half + i, b * cosine[i] + a * sine[i]);
            }
        }
    }
}

template <class Exchange>
static void gate(void* rows, size_t stride, int begin, int end, int size, Activation activation) {
    const int whole = size / W * W;
    with_activation(activation, [&](auto activate) {
        for (int r = begin; r < end; r++) {
            Exchange *a = (Exchange*)rows + (size_t)r * stride, *b = a + size;
            for (int i = 0; i < whole; i += W) store(a + i, activate(load(a + i)) * load(b + i));
            for (int i = whole; i < size; i++) {
                Vec x = Vec{};
                x[0] = to_float(a[i]);
                put(a + i, activate(x)[0] * to_float(b[i]));
            }
        }
    });
}

template <class Table>
static void embed_row(const Table* word, const Table* position, const Table* type, int size, float* out) {
    int whole = size / W * W;
    for (int i = 0; i < whole; i += W) {
        Vec x = load(word + i);
        if (type) x += load(type + i);
        if (position) x += load(position + i);
        store(out + i, x);
    }
    for (int i = whole; i < size; i++) {
        float x = to_float(word[i]);
        if (type) x += to_float(type[i]);
        if (position) x += to_float(position[i]);
        out[i] = x;
    }
}

static void embed(const void* word, const void* position, const void* type, bool half_tables, int size, float* out) {
    if (half_tables)
        embed_row((const uint16_t*)word, (const uint16_t*)position, (const uint16_t*)type, size, out);
    else
        embed_row((const float*)word, (const float*)position, (const float*)type, size, out);
}

}  // namespace TP_LEVEL
}  // namespace tp
