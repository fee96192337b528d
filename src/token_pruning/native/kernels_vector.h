// Matrix products and attention in float32 vectors, for any sizes, compiled once for every level but AMX.
//
// Product. The weight is cut into panels of NR = 2·W columns, stored [panel][in][NR]; rows are packed in blocks of
// DEPTH input columns, stored [in / DEPTH][rows][DEPTH], so that a row's numbers lie at compile-time offsets. One
// panel's block of DEPTH rows (32 KiB with AVX-512) stays in the first-level cache while all packed rows pass by; MR
// rows × NR columns of sums stay in registers: 12 × 2 of 32 vectors (AVX-512), 6 × 2 of 16 (AVX2, SSE). bfloat16
// weights are widened to float32 once per block. int8 products are those of kernels_dot.h. Prefetched are
// the next block of weights, the lines that a step's finished sums go to and, with short vectors, the next step's rows.
//
// Where the input is wide, 768 columns of it are multiplied with all panels before the next.
//
// Attention, NR queries of a head at a time, with the same registers' kernel. Keys and values are first copied side by
// side: a head's rows lie a whole row apart, where they share few of a cache's sets. Scores come out transposed,
// [keys][NR], so that softmax needs no sums across a vector, and are read transposed by the product with the values.
// They are not normalised before it: 1/sum goes onto the context, and onto the received attention. Within a window only
// the keys that one of the NR queries may see are read at all.
#include "vector.h"

namespace tp {
namespace TP_LEVEL {

constexpr int NR = 2 * W;
#if defined(TP_NEON)
constexpr int MR = 8;
#else
constexpr int MR = W == 16 ? 12 : 6;
#endif
constexpr int DEPTH = 256;
constexpr int PREFETCH_STEP = 16;  // columns between two prefetches
// Columns per turn of the innermost loop. Short vectors leave a core few instructions besides the products, of which
// another thread of it may want its share.
constexpr int UNROLL = W == 16 ? 1 : 4;
// Whether the next step's rows are prefetched: they lie apart, so that the processor by itself does not see what comes
// next. With AVX-512 they would push the panel's block out of the first-level cache (10 % slower on a Xeon).
constexpr bool PREFETCH_ROWS = W < 16;

// Input columns before the next panel.
static inline int super_for(int in) { return in <= 1536 ? in : 768; }

static inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// to[ROWS][NR] = from + rows[ROWS][depth] · panel[depth][NR]. Number (r, k) of the rows lies at r · ROW_STRIDE +
// k · COLUMN_STRIDE; rows of the panel are `panel_stride` apart, those of `from` `from_stride`. Every PREFETCH_STEP
// columns `lines` cache lines are prefetched from `prefetch` on.
struct MicroArguments {
    const float* rows;
    const float* panel;
    size_t panel_stride;
    int depth;
    const float* from;
    size_t from_stride;
    float* to;
    const char* prefetch;
    int lines;
};

#if defined(TP_NEON)
// sums + v · the number in one lane of `by`.
template <int LANE>
static inline Vec add_lane(Vec sums, Vec v, Vec by) {
    return (Vec)vfmaq_laneq_f32((float32x4_t)sums, (float32x4_t)v, (float32x4_t)by, LANE);
}
#endif

// sums += a column of rows · a row of the panel.
template <int ROWS, int ROW_STRIDE>
static inline void add_column(Vec (&sums)[ROWS][2], const float* rows, const float* panel) {
    const Vec b0 = load(panel), b1 = load(panel + W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        const Vec a = all(rows[r * ROW_STRIDE]);
        sums[r][0] += a * b0;
        sums[r][1] += a * b1;
    }
}

template <int ROWS, int ROW_STRIDE, int COLUMN_STRIDE>
static void micro(const MicroArguments& m) {
    Vec c[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        c[r][0] = load(m.from + r * m.from_stride);
        c[r][1] = load(m.from + r * m.from_stride + W);
    }
    const float *rows = m.rows, *panel = m.panel;
    const size_t panel_stride = m.panel_stride;
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
            Vec b[4][2];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, panel += panel_stride) b[i][0] = load(panel), b[i][1] = load(panel + W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const Vec a = load(rows + r * ROW_STRIDE);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    c[r][half] = add_lane<0>(c[r][half], b[0][half], a);
                    c[r][half] = add_lane<1>(c[r][half], b[1][half], a);
                    c[r][half] = add_lane<2>(c[r][half], b[2][half], a);
                    c[r][half] = add_lane<3>(c[r][half], b[3][half], a);
                }
            }
            rows += 4;
        }
#endif
        if (UNROLL > 1 && k == PREFETCH_STEP) {
#pragma GCC unroll UNROLL
            for (int i = 0; i < PREFETCH_STEP; i++, panel += panel_stride, rows += COLUMN_STRIDE)
                add_column<ROWS, ROW_STRIDE>(c, rows, panel);
        } else {
            for (; k > 0; k--, panel += panel_stride, rows += COLUMN_STRIDE)
                add_column<ROWS, ROW_STRIDE>(c, rows, panel);
        }
    } while ((left -= PREFETCH_STEP) > 0);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        store(m.to + r * NR, c[r][0]);
        store(m.to + r * NR + W, c[r][1]);
    }
}

typedef void (*Micro)(const MicroArguments&);
template <int ROW_STRIDE, int COLUMN_STRIDE, int... ROWS>
struct MicroTable {
    static constexpr Micro table[] = {micro<ROWS + 1, ROW_STRIDE, COLUMN_STRIDE>...};
};
#if defined(__AVX512F__)
template <int ROW_STRIDE, int COLUMN_STRIDE>
using Micros = MicroTable<ROW_STRIDE, COLUMN_STRIDE, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11>;
#elif defined(TP_NEON)
template <int ROW_STRIDE, int COLUMN_STRIDE>
using Micros = MicroTable<ROW_STRIDE, COLUMN_STRIDE, 0, 1, 2, 3, 4, 5, 6, 7>;
#else
template <int ROW_STRIDE, int COLUMN_STRIDE>
using Micros = MicroTable<ROW_STRIDE, COLUMN_STRIDE, 0, 1, 2, 3, 4, 5>;
#endif

// Rows of a step: as even as can be, since a last step of one or two rows would wait for its own sums.
static inline int even_step(int rows, int most = MR) {
    const int steps = (rows + most - 1) / most;
    return (rows + steps - 1) / steps;
}

// Levels with nothing but products of kernels_dot.h use none of these four, nor those with an attention of their own
// that of this file.
[[maybe_unused]] static bool fits(int, int, int) { return true; }

template <class Weight>
static size_t weight_bytes(int in, int out) {
    return round_up(out, NR) * in * sizeof(Weight);
}

static inline void convert(float x, float* to) { *to = x; }
static inline void convert(float x, uint16_t* to) { *to = to_half(x); }

template <class Weight>
static void pack_weight(const float* weight, const float*, int in, int out, void* packed, float*) {
    Weight* p = (Weight*)packed;
    for (int panel = 0; panel < out; panel += NR)
        for (int k = 0; k < in; k++)
            for (int n = panel; n < panel + NR; n++) convert(n < out ? weight[(size_t)n * in + k] : 0.0f, p++);
}

static inline float convert_back(float x) { return x; }
static inline float convert_back(uint16_t x) { return to_float(x); }

template <class Weight>
static void unpack_weight(const void* packed, int in, int out, float* weight) {
    const Weight* p = (const Weight*)packed;
    for (int panel = 0; panel < out; panel += NR)
        for (int k = 0; k < in; k++, p += NR)
            for (int n = panel; n < smaller(out, panel + NR); n++)
                weight[(size_t)n * in + k] = convert_back(p[n - panel]);
}

[[maybe_unused]] static size_t packed_rows_bytes(int rows, int in) {
    return round_up(in, DEPTH) * rows * sizeof(float);
}

[[maybe_unused]] static void pack_rows(const void* source, bool, size_t stride, const int* index, int begin, int end,
                                       int rows, int in, void* packed, float*) {
    for (int r = begin; r < end; r++) {
        const float* x = (const float*)source + (size_t)(index ? index[r] : r) * stride;
        for (int k = 0; k < in; k += DEPTH)
            memcpy((float*)packed + ((size_t)(k / DEPTH) * rows + r) * DEPTH, x + k,
                   smaller(DEPTH, in - k) * sizeof(float));
    }
}

// A block of weights made wider, and sums of one panel, or of all where the input is multiplied in several parts.
[[maybe_unused]] static size_t product_scratch(int rows, int in, int out) {
    const size_t panels = super_for(in) < in ? round_up(out, NR) / NR : 1;
    return (rows * panels + DEPTH) * NR * sizeof(float);
}

static inline const float* widen(const float* panel, int, float*) { return panel; }
static inline const float* widen(const uint16_t* panel, int depth, float* to) {
    for (int i = 0; i < depth * NR; i += W) store(to + i, load(panel + i));
    return to;
}

template <Epilogue E>
static constexpr bool activates = E == Epilogue::activate_pack || E == Epilogue::activate_store;

// Where a row's numbers from `column` on go.
template <Epilogue E, class Number = float>
static inline Number* place(const Product& p, int row, int column) {
    if (E == Epilogue::activate_pack)
        return (Number*)p.out + ((size_t)(column / DEPTH) * p.rows + row) * DEPTH + column % DEPTH;
    return (Number*)p.out + (size_t)row * p.out_stride + column;
}

static inline const float* residual_row(const Product& p, int row) {
    return p.residual + (size_t)(p.residual_index ? p.residual_index[row] : row) * p.out_stride;
}

// Where the sums of some rows go, and what is added to them: lines far apart, that would be waited for one by one.
template <Epilogue E, class Number = float>
static inline void prefetch_rows(const Product& p, int row, int rows, int column) {
    for (int r = row; r < row + rows; r++)
        for (int line = 0; line < NR; line += 64 / (int)sizeof(Number)) {
            __builtin_prefetch(place<E, Number>(p, r, column + line), 1);
            if (E == Epilogue::residual) __builtin_prefetch(residual_row(p, r) + column + line);
        }
}

// W sums of a row, from `column` on, and what is added to them. For all rows of a step before any is stored: a load
// waits for a store a multiple of 4 KiB away, as if it were the same place, and rows are often that far apart.
static inline Vec with_residual(const Product& p, Vec v, int row, int column) {
    const float* other = residual_row(p, row) + column;
    if (column + W <= p.linear->out) return v + load(other);
    float values[W] = {};
    for (int i = 0; column + i < p.linear->out; i++) values[i] = other[i];
    return v + load(values);
}

// W finished sums of a row go to `to`, or what there is of them where the output ends; `column` is the first.
template <class Number>
static inline void write(const Product& p, Vec v, int column, Number* to) {
    if (column + W <= p.linear->out) {
        store(to, v);
        return;
    }
    float values[W];
    store(values, v);
    for (int i = 0; column + i < p.linear->out; i++) put(to + i, values[i]);
}

// The same for NR.
template <class Number>
static inline void write(const Product& p, Vec first, Vec second, int column, Number* to) {
    if (column + NR <= p.linear->out) return store(to, first, second);
    write(p, first, column, to);
    if (column + W < p.linear->out) write(p, second, column + W, to + W);
}

// What happens to a panel's sums of some rows, which begin with the bias.
template <Epilogue E>
static inline void finish(const Product& p, float* sums, int row, int rows, int column) {
    for (int r = 0; E == Epilogue::residual && r < rows; r++)
        for (int half = 0; half < NR; half += W)
            store(sums + r * NR + half, with_residual(p, load(sums + r * NR + half), row + r, column + half));
    auto put_rows = [&](auto activate) {
        for (int r = 0; r < rows; r++) {
            const float* from = sums + r * NR;
            write(p, activate(load(from)), activate(load(from + W)), column, place<E>(p, row + r, column));
        }
    };
    if (activates<E>)
        with_activation(p.activation, put_rows);
    else
        put_rows([](Vec v) { return v; });
}

template <class Weight, Epilogue E>
static void multiply_with(const Product& p) {
    const Linear& w = *p.linear;
    float* widened = (float*)p.scratch;
    float* waiting = widened + (size_t)DEPTH * NR;
    const int step = even_step(p.rows), steps = (p.rows + step - 1) / step, part = super_for(w.in);
    const Weight* all_weights = (const Weight*)w.weight;
    for (int super = 0; super < w.in; super += part)
        for (int panel = p.first_panel; panel < p.last_panel; panel++) {
            const int end = smaller(w.in, super + part);
            float* sums = part < w.in ? waiting + (size_t)(panel - p.first_panel) * p.rows * NR : waiting;
            for (int k = super; k < end; k += DEPTH) {
                const int depth = smaller(DEPTH, end - k);
                const Weight* block = all_weights + ((size_t)panel * w.in + k) * NR;
                const float* b = widen(block, depth, widened);
                const float* a = (const float*)p.packed_rows + (size_t)(k / DEPTH) * p.rows * DEPTH;
                // The next block of weights, spread over this one's steps.
                const Weight* next = block + (size_t)depth * NR;
                if (k + depth == end && panel + 1 < p.last_panel)
                    next = all_weights + ((size_t)(panel + 1) * w.in + super) * NR;
                else if (k + depth == end)
                    next = end < w.in ? all_weights + ((size_t)p.first_panel * w.in + end) * NR : nullptr;
                const int slots = (depth + PREFETCH_STEP - 1) / PREFETCH_STEP;
                const int ahead = next ? (int)(depth * NR * sizeof(Weight) / 64) : 0;
                const int lines = (ahead + steps * slots - 1) / (steps * slots);
                for (int r = 0, fetched = 0; r < p.rows; r += step, fetched += slots * lines) {
                    const int count = smaller(step, p.rows - r);
                    const bool last = k + depth == w.in;
                    if (last) prefetch_rows<E>(p, r, count, panel * NR);
                    float* to = sums + (size_t)r * NR;
                    Micros<DEPTH, 1>::table[count - 1](
                        {a + (size_t)r * DEPTH, b, NR, depth, k ? to : w.bias + panel * NR, k ? (size_t)NR : 0, to,
                         (const char*)next + (size_t)fetched * 64, fetched < ahead ? lines : 0});
                    if (last) finish<E>(p, to, r, count, panel * NR);
                }
            }
        }
}

template <class Weight>
static void multiply(const Product& p) {
    switch (p.epilogue) {
        case Epilogue::store:
        case Epilogue::store_float:
            return multiply_with<Weight, Epilogue::store>(p);
        case Epilogue::activate_pack:
            return multiply_with<Weight, Epilogue::activate_pack>(p);
        case Epilogue::activate_store:
            return multiply_with<Weight, Epilogue::activate_store>(p);
        case Epilogue::residual:
            return multiply_with<Weight, Epilogue::residual>(p);
    }
}

// to[column][NR] = factor · from[row][column] for `rows` ≤ NR rows; the others are zero.
static void transpose(const float* from, size_t stride, int rows, int columns, float factor, float* to) {
    int column = 0;
    for (; column + W <= columns; column += W)
        for (int half = 0; half < NR; half += W) {
            Vec x[W];
            for (int r = 0; r < W; r++)
                x[r] = half + r < rows ? load(from + (size_t)(half + r) * stride + column) * factor : Vec{};
            transpose(x);
            for (int i = 0; i < W; i++) store(to + (size_t)(column + i) * NR + half, x[i]);
        }
    for (; column < columns; column++)
        for (int r = 0; r < NR; r++)
            to[(size_t)column * NR + r] = r < rows ? from[(size_t)r * stride + column] * factor : 0.0f;
}

constexpr int HEAD_DEPTH = 64;  // columns of a key that lie side by side

// Scratch: keys [head / HEAD_DEPTH][keys][HEAD_DEPTH], values [head / NR][keys][NR] where they are not read in place,
// NR queries transposed, their scores [keys][NR], MR rows of context, received attention [keys][W].
[[maybe_unused]] static size_t attention_scratch(int keys, int head_size) {
    const size_t wide_head = round_up(head_size, NR);
    return ((size_t)keys * (round_up(head_size, HEAD_DEPTH) + wide_head + NR + W) + (size_t)head_size * NR + MR * NR) *
           sizeof(float);
}

alignas(64) static const float ZEROS[NR] = {};
constexpr float OUTSIDE = -3e38f;  // a score outside the window, whose probability is exactly 0

// Adds what disentangled attention adds.
static void add_distance_terms(const LogitTerms& terms, int first, int count, int begin, int end, float* scores) {
    const DistanceTerms& by = terms.distance;
    for (int half = 0; half < count; half += W)
        for (int j = begin; j < end; j += W) {
            const int query = first + half, keys = smaller(W, end - j);
            Vec added[W];
            distance_block<-1>(by, terms.key_places + j, keys, by.of_keys ? by.of_keys + j * by.stride : nullptr,
                               terms.query_places + query, smaller(W, count - half),
                               by.of_queries ? by.of_queries + query * by.stride : nullptr, added);
            float* at = scores + (size_t)j * NR + half;
            for (int i = 0; i < keys; i++) store(at + i * NR, load(at + i * NR) + added[i]);
        }
}

// Adds a head's terms to the scores of the keys [begin, end) for up to NR queries from `first` on.
static void add_terms(const LogitTerms& terms, int first, int count, int begin, int end, float* scores) {
    if (terms.distance.columns) add_distance_terms(terms, first, count, begin, end, scores);
    if (!terms.bias && terms.window < 0) return;
    const int *places = terms.query_places + first, far = terms.far;
    // With nothing dropped in between, W distances lie side by side in the table.
    const bool adjacent = places[count - 1] - places[0] == count - 1;
    for (int half = 0; half < NR; half += W) {
        VecInt query;
        for (int i = 0; i < W; i++) query[i] = places[smaller(half + i, count - 1)];
        for (int j = begin; j < end; j++) {
            const int key = terms.key_places[j];
            float* at = scores + (size_t)j * NR + half;
            Vec x = load(at);
            if (terms.bias && adjacent) {
                x += load(terms.bias + far + larger(-far, smaller(places[0] + half - key, far - W + 1)));
            } else if (terms.bias) {
                VecInt distance = query - key;
                distance = distance > far ? VecInt{} + far : distance;
                distance = distance < -far ? VecInt{} - far : distance;
                x += gather(terms.bias, distance + far);
            }
            if (terms.window >= 0) {
                const VecInt distance = query - key;
                x = ((distance > terms.window) | (distance < -terms.window)) ? all(OUTSIDE) : x;
            }
            store(at, x);
        }
    }
}

template <bool TERMS>
static void attend_with(const Attention& a) {
    const int n = a.keys, size = a.head_size, wide_head = (int)round_up(size, NR);
    float* keys = (float*)a.scratch;
    float* copied_values = keys + n * round_up(size, HEAD_DEPTH);
    float* queries = copied_values + (size_t)n * wide_head;
    float* scores = queries + (size_t)size * NR;
    float* context = scores + (size_t)n * NR;
    float* received = context + MR * NR;

    const float *key = (const float*)a.key, *value = (const float*)a.value;
    // Values of many queries are brought together: their rows lie too far apart for the first-level cache.
    const bool in_place = size % NR == 0 && a.queries <= NR;
    for (int d = 0; d < size; d += HEAD_DEPTH)
        for (int j = 0; j < n; j++)
            memcpy(keys + ((size_t)d * n + (size_t)j * HEAD_DEPTH), key + j * a.stride + d,
                   smaller(HEAD_DEPTH, size - d) * sizeof(float));
    if (!in_place)
        for (int d = 0; d < wide_head; d += NR)
            for (int j = 0; j < n; j++) {
                float* to = copied_values + ((size_t)d * n + (size_t)j * NR);
                const float* from = value + j * a.stride + d;
                if (d + NR <= size)
                    store(to, load(from)), store(to + W, load(from + W));
                else
                    for (int i = 0; i < NR; i++) to[i] = d + i < size ? from[i] : 0.0f;
            }
    for (int j = 0; a.received && j < n; j++) store(received + j * W, Vec{});

    int begin = 0, end = n;  // the keys that are read
    for (int first = 0; first < a.queries; first += NR) {
        const int count = smaller(NR, a.queries - first);
        const float* query = (const float*)a.query + (size_t)first * a.query_stride;
        transpose(query, a.query_stride, count, size, a.scale, queries);
        if (TERMS && a.terms.window >= 0) {
            const int *places = a.terms.key_places, *asking = a.terms.query_places + first;
            while (begin < n && places[begin] < asking[0] - a.terms.window) begin++;
            for (end = begin; end < n && places[end] <= asking[count - 1] + a.terms.window;) end++;
        }
        const int key_step = even_step(end - begin);
        for (int d = 0; d < size; d += HEAD_DEPTH)
            for (int j = begin; j < end; j += key_step)
                Micros<HEAD_DEPTH, 1>::table[smaller(key_step, end - j) - 1](
                    {keys + ((size_t)d * n + (size_t)j * HEAD_DEPTH), queries + (size_t)d * NR, NR,
                     smaller(HEAD_DEPTH, size - d), d ? scores + (size_t)j * NR : ZEROS, d ? (size_t)NR : 0,
                     scores + (size_t)j * NR, nullptr, 0});
        if (TERMS) add_terms(a.terms, first, count, begin, end, scores);
        float inverse[NR];
        for (int half = 0; half < NR; half += W) {
            float* column = scores + half;
            VecInt there;  // all bits of the columns that have a query; others may hold NaN, which no zero would undo
            for (int i = 0; i < W; i++) there[i] = half + i < count ? -1 : 0;
            Vec most = load(column + (size_t)begin * NR), total = Vec{};
            for (int j = begin + 1; j < end; j++) most = maximum(most, load(column + (size_t)j * NR));
            for (int j = begin; j < end; j++) {  // a NaN that `most` has lost makes the total NaN all the same
                const Vec x = load(column + (size_t)j * NR);
                VecInt counts = there;
                if (TERMS) counts &= x != OUTSIDE;
                const Vec e = (Vec)((VecInt)exponential(x - most) & counts);
                store(column + (size_t)j * NR, e);
                total += e;
            }
            store(inverse + half, 1.0f / total);
            for (int i = larger(0, count - half); i < W; i++) inverse[half + i] = 0;  // no query is there
            const Vec factor = load(inverse + half);
            for (int j = begin; a.received && j < end; j++)
                store(received + j * W, load(received + j * W) + load(column + (size_t)j * NR) * factor);
        }
        const int step = even_step(count);
        for (int d = 0; d < wide_head; d += NR)
            for (int r = 0; r < count; r += step) {
                const int rows = smaller(step, count - r);
                const float* values = in_place ? value + d : copied_values + (size_t)d * n;
                const size_t stride = in_place ? a.stride : NR;
                Micros<1, NR>::table[rows - 1]({scores + (size_t)begin * NR + r, values + begin * stride, stride,
                                                end - begin, ZEROS, 0, context, nullptr, 0});
                for (int i = 0; i < rows; i++) {
                    float* to = (float*)a.context + (size_t)(first + r + i) * a.context_stride + d;
                    const int columns = smaller(NR, size - d);
                    if (columns == NR) {
                        store(to, load(context + i * NR) * inverse[r + i]);
                        store(to + W, load(context + i * NR + W) * inverse[r + i]);
                    } else {
                        for (int c = 0; c < columns; c++) to[c] = context[i * NR + c] * inverse[r + i];
                    }
                }
            }
    }
    for (int j = 0; a.received && j < n; j++) a.received[j] = sum(load(received + j * W));
}

[[maybe_unused]] static void attend(const Attention& a) {
    if (a.terms.any())
        attend_with<true>(a);
    else
        attend_with<false>(a);
}

static void nothing() {}

template <class Weight>
static constexpr Kernels table_of(const char* name, const char* description) {
    return {name,
            description,
            NR,
            192,
            false,
            false,
            false,
            fits,
            weight_bytes<Weight>,
            pack_weight<Weight>,
            unpack_weight<Weight>,
            packed_rows_bytes,
            pack_rows,
            product_scratch,
            multiply<Weight>,
            attention_scratch,
            attend,
            normalize,
            rotate<float>,
            gate<float>,
            embed,
            nothing,
            nothing};
}

}  // namespace TP_LEVEL
}  // namespace tp
