// Matrix products and attention on AMX tiles: bfloat16, and int8 weights with int8 rows.
//
// A tile is 16 rows of 64 bytes. A product of tiles adds a 16 × (32 bfloat16 | 64 int8) tile of rows times a tile of
// weights (pairs or quadruples of input columns interleaved) to a 16 × 16 tile of 32-bit sums.
//
// Product. Weights are stored [out / 32][in / TILE_K][2 tiles]; rows in blocks of a few tiles of input columns,
// [in / (DEPTH · TILE_K)][rows / 32][DEPTH][2 tiles]: everything is read in the order it lies in memory. Two tiles of
// rows and two of weights give four tiles of sums, so that each tile that is loaded is used twice. A block of weights
// (2 · DEPTH KiB) stays in the first-level cache while all rows pass by from the second; meanwhile the next block is
// prefetched, spread evenly over the loop. Sums wait in a scratch between blocks. Where the input is wide, 24 tiles of
// it are multiplied with all panels before the next, so that the rows in use fit the second-level cache too. Tiles of a
// sum are added in one order, so a row never depends on its neighbours.
//
// Attention. 32 queries at a time: scores on tiles, softmax in vectors, context on tiles. Keys and values of the head
// are rearranged into weight tiles once. Probabilities are not normalised before they are multiplied with the values:
// the 1/sum goes onto the few columns of the context, and onto the column sums of the received attention. Within a
// window only the tiles of keys that one of the queries may see are multiplied.
#define TP_LEVEL amx
#include "vector.h"

namespace tp {
namespace TP_LEVEL {

constexpr int TILE = 1024;  // bytes

// Tiles of input columns before the next panel.
static inline int super_for(int tiles) { return tiles <= 48 ? tiles : 24; }

// Tiles of input columns in a block, a divisor of 24: two pairs of row tiles and a block stay in the first-level cache
// together if they are a little shorter.
static inline int depth_for(int pairs) { return pairs == 2 ? 6 : 8; }

// Tile instructions of our own: GCC 12's intrinsics do not tell the compiler what memory they read or write.
template <int T>
static inline void tile_load(const void* from, size_t bytes_per_row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes_per_row), "n"(T) : "memory");
}
template <int T>
static inline void tile_store(void* to, size_t bytes_per_row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes_per_row), "n"(T) : "memory");
}
template <int T>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"n"(T));
}
struct Bfloat16 {
    typedef uint16_t Number;
    static constexpr int tile_k = 32;
    template <int SUMS, int ROWS, int WEIGHTS>
    static inline void tile_multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUMS), "n"(ROWS), "n"(WEIGHTS));
    }
};
struct Int8 {
    typedef int8_t Number;
    static constexpr int tile_k = 64;
    template <int SUMS, int ROWS, int WEIGHTS>
    static inline void tile_multiply() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUMS), "n"(ROWS), "n"(WEIGHTS));
    }
};

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void enter() {
    static const TileConfiguration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
}
static void leave() { asm volatile("tilerelease"); }

static inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static inline __m512 activated(const RoughNormal& table, __m512 x, Activation activation) {
    return activation == Activation::gelu ? _mm512_mul_ps(x, table.at(x)) : (__m512)activate((Vec)x, activation);
}

// ---- products

template <class T>
static bool fits(int hidden, int inner, int head_size) {
    return hidden % T::tile_k == 0 && inner % T::tile_k == 0 && head_size % 32 == 0 && head_size <= 128;
}

template <class T>
static size_t weight_bytes(int in, int out) {
    return (size_t)in * round_up(out, 32) * sizeof(typename T::Number);
}

// weight[out, in] → [panel][tile of inputs][half of the panel][row of GROUP inputs][column][GROUP]
template <class T>
static void pack_weight(const float* weight, const float* given, int in, int out, void* packed, float* scale) {
    typedef typename T::Number Number;
    constexpr int GROUP = 4 / sizeof(Number);
    Number* to = (Number*)packed;
    for (int panel = 0; panel < out; panel += 32) {
        WeightRow rows[32] = {};
        for (int n = panel; scale && n < smaller(out, panel + 32); n++) {
            rows[n - panel] = weight_row(weight + (size_t)n * in, in, 127, given ? given + n : nullptr);
            scale[n] = rows[n - panel].scale;
        }
        for (int k = 0; k < in; k += T::tile_k)
            for (int half = 0; half < 2; half++)
                for (int row = 0; row < 16; row++)
                    for (int column = 0; column < 16; column++)
                        for (int i = 0; i < GROUP; i++) {
                            int n = panel + half * 16 + column;
                            float x = n < out ? weight[(size_t)n * in + k + row * GROUP + i] : 0.0f;
                            if (sizeof(Number) == 1)
                                *to++ = (Number)(n < out ? rows[n - panel].whole(x) : 0.0f);
                            else
                                *to++ = (Number)to_half(x);
                        }
    }
}

static inline float convert_back(uint16_t x) { return to_float(x); }
static inline float convert_back(int8_t x) { return x; }

template <class T>
static void unpack_weight(const void* packed, int in, int out, float* weight) {
    typedef typename T::Number Number;
    constexpr int GROUP = 4 / sizeof(Number);
    const Number* from = (const Number*)packed;
    for (int panel = 0; panel < out; panel += 32)
        for (int k = 0; k < in; k += T::tile_k)
            for (int half = 0; half < 2; half++)
                for (int row = 0; row < 16; row++)
                    for (int column = 0; column < 16; column++)
                        for (int i = 0; i < GROUP; i++, from++) {
                            const int n = panel + half * 16 + column;
                            if (n < out) weight[(size_t)n * in + k + row * GROUP + i] = convert_back(*from);
                        }
}

template <class T>
static size_t packed_rows_bytes(int rows, int in) {
    return round_up(rows, 32) * in * sizeof(typename T::Number);
}

// Where a tile of a row lies among packed rows, in bytes.
static inline size_t packed_place(int row, int tile, int pairs, int tiles) {
    const int deepest = depth_for(pairs), block = tile / deepest * deepest, depth = smaller(deepest, tiles - block);
    return ((size_t)block * pairs + (size_t)(row / 32) * depth + (tile - block)) * 2 * TILE + (row / 16 % 2) * TILE +
           (row % 16) * 64;
}

static inline __m512 load_row(const void* x, bool half, int i) {
    return half ? (__m512)load((const uint16_t*)x + i) : _mm512_loadu_ps((const float*)x + i);
}

template <class T>
static void pack_rows(const void* source, bool half, size_t stride, const int* index, int begin, int end, int rows,
                      int in, void* packed, float* row_scale) {
    const size_t width = half ? 2 : 4;
    const int tiles = in / T::tile_k, pairs = (rows + 31) / 32, deepest = depth_for(pairs);
    for (int r = begin; r < end; r++) {
        const char* x = (const char*)source + (size_t)(index ? index[r] : r) * stride * width;
        __m512 factor = _mm512_set1_ps(1);
        if (sizeof(typename T::Number) == 1) {
            __m512i most = _mm512_setzero_si512();  // as whole numbers, among which NaN is the largest
            for (int i = 0; i < in; i += 16)
                most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(load_row(x, half, i))));
            const RowScale row = row_scale_of(_mm512_reduce_max_epi32(most));
            row_scale[r] = row.scale;
            factor = _mm512_set1_ps(row.inverse);
        }
        for (int block = 0; block < tiles; block += deepest) {
            char* to = (char*)packed + packed_place(r, block, pairs, tiles);
            for (int t = block; t < smaller(tiles, block + deepest); t++, to += 2 * TILE) {
                const int i = t * T::tile_k;
                if (sizeof(typename T::Number) == 1) {
                    __m128i part[4];
                    for (int q = 0; q < 4; q++)
                        part[q] = _mm512_cvtsepi32_epi8(
                            _mm512_cvtps_epi32(_mm512_mul_ps(load_row(x, half, i + q * 16), factor)));
                    for (int q = 0; q < 4; q++) _mm_store_si128((__m128i*)to + q, part[q]);
                } else if (half) {
                    _mm512_store_si512(to, _mm512_loadu_si512(x + (size_t)i * 2));
                } else {
                    store((uint16_t*)to, load_row(x, false, i), load_row(x, false, i + 16));
                }
            }
        }
    }
}

// Sums of one panel, or of all where the input is multiplied in several parts, and the block that is being finished.
static size_t product_scratch(int rows, int in, int out) {
    const size_t panels = super_for(in / 32) < in / 32 ? round_up(out, 32) / 32 : 1;
    return (round_up(rows, 32) * panels + 32) * 32 * sizeof(float);
}

// to[2 · ROW_TILES tiles] = (from +) rows · weights over `depth` tiles, prefetching `lines` cache lines per step.
template <class T, int ROW_TILES>
static inline void micro(const char* rows, const char* weights, int depth, const float* from, float* to,
                         bool accumulate, const char* prefetch, int lines) {
    if (accumulate) {
        tile_load<0>(from, 64), tile_load<1>(from + 256, 64);
        if (ROW_TILES == 2) tile_load<2>(from + 512, 64), tile_load<3>(from + 768, 64);
    } else {
        tile_zero<0>(), tile_zero<1>();
        if (ROW_TILES == 2) tile_zero<2>(), tile_zero<3>();
    }
    for (int k = 0; k < depth; k++) {
        tile_load<4>(rows, 64);
        tile_load<6>(weights, 64);
        T::template tile_multiply<0, 4, 6>();
        for (int i = 0; i < lines / 2; i++) _mm_prefetch(prefetch + 64 * i, _MM_HINT_T1);
        tile_load<7>(weights + TILE, 64);
        T::template tile_multiply<1, 4, 7>();
        if (ROW_TILES == 2) {
            tile_load<5>(rows + TILE, 64);
            T::template tile_multiply<2, 5, 6>(), T::template tile_multiply<3, 5, 7>();
        }
        for (int i = lines / 2; i < lines; i++) _mm_prefetch(prefetch + 64 * i, _MM_HINT_T1);
        prefetch += 64 * lines;
        rows += 2 * TILE, weights += 2 * TILE;
    }
    tile_store<0>(to, 64), tile_store<1>(to + 256, 64);
    if (ROW_TILES == 2) tile_store<2>(to + 512, 64), tile_store<3>(to + 768, 64);
}

template <class T, Epilogue E>
static inline void finish(const Product& p, const float* sums, int panel, int begin, int end) {
    const Linear& w = *p.linear;
    const int column = panel * 32;
    const RoughNormal& table = RoughNormal::get();
    char* first_row = (char*)p.out;
    if (E == Epilogue::activate_pack) first_row += packed_place(begin, panel, (p.rows + 31) / 32, w.out / 32);
    __m512 bias0 = _mm512_loadu_ps(w.bias + column), bias1 = _mm512_loadu_ps(w.bias + column + 16), scale0, scale1;
    if (sizeof(typename T::Number) == 1)
        scale0 = _mm512_loadu_ps(w.scale + column), scale1 = _mm512_loadu_ps(w.scale + column + 16);
    for (int r = begin; r < end; r++) {
        __m512 v0, v1;
        const float* left = sums + (r - begin) / 16 * 512 + (r - begin) % 16 * 16;  // the row in the left tile
        if (sizeof(typename T::Number) == 1) {
            const __m512 row = _mm512_set1_ps(p.row_scale[r]);  // the sums times one of the scales could overflow
            v0 = _mm512_cvtepi32_ps(_mm512_loadu_si512(left));
            v1 = _mm512_cvtepi32_ps(_mm512_loadu_si512(left + 256));
            v0 = _mm512_fmadd_ps(v0, _mm512_mul_ps(row, scale0), bias0);
            v1 = _mm512_fmadd_ps(v1, _mm512_mul_ps(row, scale1), bias1);
        } else {
            v0 = _mm512_add_ps(_mm512_loadu_ps(left), bias0);
            v1 = _mm512_add_ps(_mm512_loadu_ps(left + 256), bias1);
        }
        const size_t place = (size_t)r * p.out_stride + column;
        if (E == Epilogue::store) {
            store((uint16_t*)p.out + place, v0, v1);
        } else if (E == Epilogue::activate_store) {
            store((uint16_t*)p.out + place, activated(table, v0, p.activation), activated(table, v1, p.activation));
        } else if (E == Epilogue::activate_pack) {
            char* to = first_row + (r - begin) / 16 * TILE + (r - begin) % 16 * 64;
            store((uint16_t*)to, activated(table, v0, p.activation), activated(table, v1, p.activation));
        } else {
            float* to = (float*)p.out + place;
            if (E == Epilogue::residual) {
                const float* other =
                    p.residual + (size_t)(p.residual_index ? p.residual_index[r] : r) * p.out_stride + column;
                v0 = _mm512_add_ps(v0, _mm512_loadu_ps(other));
                v1 = _mm512_add_ps(v1, _mm512_loadu_ps(other + 16));
            }
            _mm512_storeu_ps(to, v0);
            _mm512_storeu_ps(to + 16, v1);
        }
    }
}

template <class T, Epilogue E>
static void multiply_with(const Product& p) {
    const int tiles = p.linear->in / T::tile_k, row_tiles = (p.rows + 15) / 16, pairs = (row_tiles + 1) / 2;
    const int deepest = depth_for(pairs), part = super_for(tiles);
    const size_t panel_bytes = (size_t)tiles * 2 * TILE;
    const char* all_weights = (const char*)p.linear->weight;
    float* finished = (float*)p.scratch;
    float* waiting = finished + 1024;
    for (int super = 0; super < tiles; super += part)
        for (int panel = p.first_panel; panel < p.last_panel; panel++) {
            const int end = smaller(tiles, super + part);
            float* sums = part < tiles ? waiting + (size_t)(panel - p.first_panel) * pairs * 1024 : waiting;
            for (int k = super; k < end; k += deepest) {
                const int depth = smaller(deepest, end - k);
                const bool last = k + depth == tiles;
                const char* weights = all_weights + panel_bytes * panel + (size_t)k * 2 * TILE;
                const char* next = weights + (size_t)depth * 2 * TILE;  // where the walk over the weights goes on
                if (k + depth == end)
                    next = panel + 1 < p.last_panel ? weights + panel_bytes - (size_t)(k - super) * 2 * TILE
                           : end < tiles            ? all_weights + panel_bytes * p.first_panel + (size_t)end * 2 * TILE
                                                    : nullptr;
                const int lines = next ? (depth * 2 * TILE / 64 + pairs * depth - 1) / (pairs * depth) : 0;
                // With one pair of row tiles all time goes into reading weights, which is faster a step ahead.
                if (pairs == 1 && next) next = weights + 2 * TILE;
                const char* rows = (const char*)p.packed_rows + ((size_t)k * pairs) * 2 * TILE;
                for (int pair = 0; pair < pairs; pair++) {
                    const char* block = rows + (size_t)pair * depth * 2 * TILE;
                    const char* prefetch = next + (size_t)pair * depth * lines * 64;
                    const int count = pair * depth * lines * 64 < depth * 2 * TILE ? lines : 0;
                    float *from = sums + pair * 1024, *to = last ? finished : from;
                    if (2 * pair + 1 < row_tiles)
                        micro<T, 2>(block, weights, depth, from, to, k > 0, prefetch, count);
                    else
                        micro<T, 1>(block, weights, depth, from, to, k > 0, prefetch, count);
                    if (last) finish<T, E>(p, finished, panel, pair * 32, smaller(p.rows, pair * 32 + 32));
                }
            }
        }
}

template <class T>
static void multiply(const Product& p) {
    switch (p.epilogue) {
        case Epilogue::store:
            return multiply_with<T, Epilogue::store>(p);
        case Epilogue::store_float:
            return multiply_with<T, Epilogue::store_float>(p);
        case Epilogue::activate_pack:
            return multiply_with<T, Epilogue::activate_pack>(p);
        case Epilogue::activate_store:
            return multiply_with<T, Epilogue::activate_store>(p);
        case Epilogue::residual:
            return multiply_with<T, Epilogue::residual>(p);
    }
}

// ---- attention

// 16 rows of 16 double words, transposed; rows beyond `count` are zero. The result's rows are 64 bytes apart.
static inline void transpose(const uint16_t* from, size_t stride, int count, uint16_t* to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88), r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, r[i]);
}

static constexpr InterleaveIndex<32> interleave_index;

struct AttentionScratch {
    int wide;  // keys rounded up to a multiple of 32
    uint16_t *keys, *values, *queries, *probabilities;
    float *scores, *context;
};

static size_t lay_out(AttentionScratch& s, char* base, int keys, int head_size) {
    s.wide = (int)round_up(keys, 32);
    size_t at = 0;
    auto take = [&](size_t bytes) {
        char* p = base + at;
        at += round_up(bytes, 64) + 64;  // rows of 32 queries must not all start at the same place in a cache set
        return p;
    };
    s.keys = (uint16_t*)take((size_t)s.wide * head_size * 2);
    s.values = (uint16_t*)take((size_t)s.wide * head_size * 2);
    s.queries = (uint16_t*)take((size_t)32 * head_size * 2);
    s.probabilities = (uint16_t*)take((size_t)32 * s.wide * 2);
    s.scores = (float*)take((size_t)32 * s.wide * 4);
    s.context = (float*)take((size_t)32 * head_size * 4);
    return at;
}

static size_t attention_scratch(int keys, int head_size) {
    AttentionScratch s;
    return lay_out(s, nullptr, keys, head_size);
}

// Scores of 16 · TILES queries against the keys [begin, end), two tiles of keys at a time.
template <int TILES>
static inline void score_tiles(const AttentionScratch& s, const uint16_t* query, size_t stride, int blocks, int begin,
                               int end) {
    const int wide = s.wide;
    for (int j = begin; j < end; j += 32) {
        const uint16_t* keys = s.keys + (size_t)(j / 16) * blocks * 512;
        tile_zero<0>(), tile_zero<1>();
        if (TILES == 2) tile_zero<2>(), tile_zero<3>();
        for (int b = 0; b < blocks; b++) {
            tile_load<6>(keys + b * 512, 64), tile_load<7>(keys + (blocks + b) * 512, 64);
            tile_load<4>(query + b * 32, stride * 2);
            Bfloat16::tile_multiply<0, 4, 6>(), Bfloat16::tile_multiply<1, 4, 7>();
            if (TILES == 2) {
                tile_load<5>(query + 16 * stride + b * 32, stride * 2);
                Bfloat16::tile_multiply<2, 5, 6>(), Bfloat16::tile_multiply<3, 5, 7>();
            }
        }
        tile_store<0>(s.scores + j, wide * 4), tile_store<1>(s.scores + j + 16, wide * 4);
        if (TILES == 2) {
            tile_store<2>(s.scores + 16 * wide + j, wide * 4);
            tile_store<3>(s.scores + 16 * wide + j + 16, wide * 4);
        }
    }
}

// Context of 16 · TILES queries, 32 columns of the head at a time.
template <int TILES>
static inline void context_tiles(const AttentionScratch& s, int head_size, int begin, int end) {
    const int wide = s.wide, column_tiles = head_size / 16;
    for (int c = 0; c < column_tiles; c += 2) {
        tile_zero<0>(), tile_zero<1>();
        if (TILES == 2) tile_zero<2>(), tile_zero<3>();
        for (int j = begin; j < end; j += 32) {
            const uint16_t* values = s.values + ((size_t)(j / 32) * column_tiles + c) * 512;
            tile_load<6>(values, 64), tile_load<7>(values + 512, 64);
            tile_load<4>(s.probabilities + j, wide * 2);
            Bfloat16::tile_multiply<0, 4, 6>(), Bfloat16::tile_multiply<1, 4, 7>();
            if (TILES == 2) {
                tile_load<5>(s.probabilities + 16 * wide + j, wide * 2);
                Bfloat16::tile_multiply<2, 5, 6>(), Bfloat16::tile_multiply<3, 5, 7>();
            }
        }
        float* context = s.context + c * 16;
        tile_store<0>(context, head_size * 4), tile_store<1>(context + 16, head_size * 4);
        if (TILES == 2) {
            tile_store<2>(context + 16 * head_size, head_size * 4);
            tile_store<3>(context + 16 * head_size + 16, head_size * 4);
        }
    }
}

// The scores of one query for the keys [begin, end), of which there are `keys`, times `scale` and with a head's terms,
// in units of log 2. Outside the window they are so low that their power of two is 0.
static void add_terms(const LogitTerms& terms, int query, int keys, int begin, int end, __m512 scale, float* scores) {
    const __m512i place = _mm512_set1_epi32(terms.query_places[query]), far = _mm512_set1_epi32(terms.far);
    const __m512i window = _mm512_set1_epi32(terms.window);
    for (int j = begin; j < smaller(end, keys); j += 16) {
        const __mmask16 there = (__mmask16)(keys - j < 16 ? (1u << (keys - j)) - 1 : 0xffff);
        const __m512i distance = _mm512_sub_epi32(place, _mm512_maskz_loadu_epi32(there, terms.key_places + j));
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + j), scale);
        if (terms.bias) {
            const __m512i column = _mm512_add_epi32(
                far, _mm512_min_epi32(far, _mm512_max_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), far), distance)));
            x = _mm512_fmadd_ps(_mm512_i32gather_ps(column, terms.bias, 4), _mm512_set1_ps(1.44269504f), x);
        }
        if (terms.window >= 0)
            x = _mm512_mask_mov_ps(x, _mm512_cmpgt_epi32_mask(_mm512_abs_epi32(distance), window),
                                   _mm512_set1_ps(-3e38f));
        _mm512_storeu_ps(scores + j, x);
    }
}

// The scores of some queries for the keys [begin, end), rows `wide` apart, times `scale` and with what disentangled
// attention adds, in units of log 2.
static void add_distance_terms(const LogitTerms& terms, int first, int count, int begin, int end, int wide,
                               __m512 scale, float* scores) {
    const DistanceTerms& by = terms.distance;
    for (int r = 0; r < count; r += 16)
        for (int j = begin; j < end; j += 16) {
            const int query = first + r, rows = smaller(16, count - r);
            Vec added[16];
            distance_block<1>(by, terms.query_places + query, rows,
                              by.of_queries ? by.of_queries + query * by.stride : nullptr, terms.key_places + j,
                              smaller(16, end - j), by.of_keys ? by.of_keys + j * by.stride : nullptr, added);
            for (int i = 0; i < rows; i++) {
                float* x = scores + (size_t)(r + i) * wide + j;
                _mm512_storeu_ps(x, _mm512_fmadd_ps(_mm512_loadu_ps(x), scale, (__m512)(added[i] * 1.44269504f)));
            }
        }
}

static void attend(const Attention& a) {
    const int n = a.keys, size = a.head_size, blocks = size / 32, column_tiles = size / 16;
    AttentionScratch s;
    lay_out(s, (char*)a.scratch, n, size);
    const uint16_t *query = (const uint16_t*)a.query, *key = (const uint16_t*)a.key, *value = (const uint16_t*)a.value;

    for (int j = 0; j < s.wide; j += 16)
        for (int b = 0; b < blocks; b++)
            transpose(key + j * a.stride + b * 32, a.stride, larger(0, smaller(16, n - j)),
                      s.keys + ((size_t)(j / 16) * blocks + b) * 512);
    const __m512i low = _mm512_load_si512(interleave_index.low), high = _mm512_load_si512(interleave_index.high);
    for (int j = 0; j < s.wide; j += 2)
        for (int c = 0; c < column_tiles; c += 2) {
            __m512i even = j < n ? _mm512_loadu_si512(value + j * a.stride + c * 16) : _mm512_setzero_si512();
            __m512i odd = j + 1 < n ? _mm512_loadu_si512(value + (j + 1) * a.stride + c * 16) : _mm512_setzero_si512();
            uint16_t* to = s.values + ((size_t)(j / 32) * column_tiles + c) * 512 + (j & 31) * 16;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + 512, _mm512_permutex2var_epi16(even, high, odd));
        }
    if (a.received) memset(a.received, 0, n * sizeof(float));

    const __m512 scale = _mm512_set1_ps(a.scale * 1.44269504f);  // probabilities are powers of two
    const int whole = n / 16 * 16;
    const __mmask16 rest = (__mmask16)((1u << (n - whole)) - 1);
    int begin = 0, end = s.wide;  // the tiles of keys that are read
    for (int first = 0; first < a.queries; first += 32) {
        const int count = smaller(32, a.queries - first), tiles = (count + 15) / 16;
        if (a.terms.any() && a.terms.window >= 0) {
            const int *places = a.terms.key_places, *asking = a.terms.query_places + first;
            while (begin < n && places[begin] < asking[0] - a.terms.window) begin++;
            for (end = begin; end < n && places[end] <= asking[count - 1] + a.terms.window;) end++;
            begin = begin / 32 * 32, end = (int)round_up(end, 32);
        }
        const uint16_t* rows = query + first * a.query_stride;
        size_t stride = a.query_stride;
        if (count < tiles * 16) {  // a tile must not read past the last row
            for (int r = 0; r < count; r++) memcpy(s.queries + r * size, rows + r * stride, size * 2);
            memset(s.queries + count * size, 0, (tiles * 16 - count) * size * 2);
            rows = s.queries, stride = size;
        }
        if (tiles == 2)
            score_tiles<2>(s, rows, stride, blocks, begin, end);
        else
            score_tiles<1>(s, rows, stride, blocks, begin, end);

        if (a.terms.distance.columns)
            add_distance_terms(a.terms, first, count, begin, smaller(end, n), s.wide, scale, s.scores);
        const __m512 left = a.terms.distance.columns ? _mm512_set1_ps(1) : scale;  // to be multiplied with
        float inverse[32];
        for (int r = 0; r < count; r++) {
            float* x = s.scores + r * s.wide;
            uint16_t* p = s.probabilities + r * s.wide;
            __m512 most = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps();
            __m512 factor = left;
            if (a.terms.bias || a.terms.window >= 0) {
                add_terms(a.terms, first + r, n, begin, end, factor, x);
                factor = _mm512_set1_ps(1);
            }
            for (int j = begin; j < smaller(end, whole); j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + j));
            if (rest && end > whole) most = _mm512_mask_max_ps(most, rest, most, _mm512_loadu_ps(x + whole));
            const __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), factor);
            for (int j = begin; j < end; j += 32) {
                __m512 e0 = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(x + j), factor, top));
                __m512 e1 = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(x + j + 16), factor, top));
                if (j + 32 > n) {
                    e0 = _mm512_maskz_mov_ps(j + 16 <= n ? 0xffff : rest, e0);
                    e1 = _mm512_maskz_mov_ps(j + 16 <= n ? rest : 0, e1);
                }
                total = _mm512_add_ps(total, _mm512_add_ps(e0, e1));
                store(p + j, e0, e1);
                if (a.received) _mm512_storeu_ps(x + j, e0), _mm512_storeu_ps(x + j + 16, e1);
            }
            inverse[r] = 1.0f / _mm512_reduce_add_ps(total);
        }
        if (a.received)
            for (int j = begin; j < smaller(end, n); j += 16) {
                const __mmask16 mask = j < whole ? 0xffff : rest;
                __m512 sums = _mm512_maskz_loadu_ps(mask, a.received + j);
                for (int r = 0; r < count; r++)
                    sums =
                        _mm512_fmadd_ps(_mm512_loadu_ps(s.scores + r * s.wide + j), _mm512_set1_ps(inverse[r]), sums);
                _mm512_mask_storeu_ps(a.received + j, mask, sums);
            }
        if (tiles == 2)
            context_tiles<2>(s, size, begin, end);
        else
            context_tiles<1>(s, size, begin, end);
        for (int r = 0; r < count; r++) {
            const float* x = s.context + r * size;
            uint16_t* to = (uint16_t*)a.context + (size_t)(first + r) * a.context_stride;
            const __m512 factor = _mm512_set1_ps(inverse[r]);
            for (int d = 0; d < size; d += 32)
                store(to + d, _mm512_mul_ps(_mm512_loadu_ps(x + d), factor),
                      _mm512_mul_ps(_mm512_loadu_ps(x + d + 16), factor));
        }
    }
}

template <class T>
static constexpr Kernels table_of(const char* description, bool quantized) {
    return {"amx",
            description,
            32,
            384,
            true,
            quantized,
            true,
            fits<T>,
            weight_bytes<T>,
            pack_weight<T>,
            unpack_weight<T>,
            packed_rows_bytes<T>,
            pack_rows<T>,
            product_scratch,
            multiply<T>,
            attention_scratch,
            attend,
            normalize,
            rotate<uint16_t>,
            gate<uint16_t>,
            embed,
            enter,
            leave};
}

}  // namespace TP_LEVEL

const Kernels* amx_kernels(Dtype dtype) {
    static const Kernels bfloat16 = amx::table_of<amx::Bfloat16>("bfloat16 products on AMX tiles", false);
    static const Kernels int8 = amx::table_of<amx::Int8>("int8 products on AMX tiles", true);
    return dtype == Dtype::bfloat16 ? &bfloat16 : dtype == Dtype::int8 ? &int8 : nullptr;
}

}  // namespace tp
