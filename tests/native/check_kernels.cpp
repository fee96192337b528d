// Every kernel level against plain loops in double precision, on buffers of exactly the size they are said to have.
// `make sanitize` builds it with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer.
//   check [--quick | --shapes | --cases N [--seed S] [--level NAME]]
// --shapes: products and attention of all sizes, nothing else; --cases: N forward passes of random encoders, nothing
// else, of all levels or one
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../src/token_pruning/native/cpu_level.h"
#include "../../src/token_pruning/native/encoder.h"
#include "../../src/token_pruning/native/threads.h"

using namespace tp;

// Allocations that can be made to fail: the one after so many, and all that follow.
static std::atomic<long> allocations_left{-1};  // below 0: none fails
static std::atomic<bool> allocation_failed{false};

static void* allocate(size_t bytes, size_t alignment) {
    if (allocations_left.load() >= 0 && allocations_left.fetch_sub(1) == 0) {
        allocations_left.store(0), allocation_failed.store(true);
        throw std::bad_alloc();
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes ? bytes : 1)) throw std::bad_alloc();
    return memory;
}
void* operator new(size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, (size_t)alignment); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

static int failures = 0, checks = 0;

static void check(bool good, const std::string& what) {
    checks++;
    if (good) return;
    failures++;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

static std::mt19937 generator(7);
static std::vector<float> random_numbers(size_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(count);
    for (float& v : values) v = normal(generator);
    return values;
}

// Aligned memory of exactly so many bytes, so that the sanitizer sees the first byte too many.
struct Exact {
    explicit Exact(size_t bytes) {
        if (posix_memalign(&data, 64, bytes ? bytes : 1)) std::abort();
        std::memset(data, 0xFF, bytes);  // NaN: what is read must have been written
    }
    ~Exact() { std::free(data); }
    Exact(const Exact&) = delete;
    void* data = nullptr;
};

static uint16_t half(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
static float from_half(uint16_t h) {
    uint32_t word = (uint32_t)h << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

struct Candidate {
    const Kernels* kernels;
    Dtype dtype;
    int level;
    std::string name() const {
        const char* names[] = {"float32", "bfloat16", "int8"};
        return std::string(kernels->level) + " " + names[(int)dtype];
    }
    bool attends_in_half() const { return level == AVX512_BF16 || level == AMX; }
    double tolerance() const { return dtype == Dtype::float32 ? 1e-4 : dtype == Dtype::bfloat16 ? 2e-2 : 4e-2; }
};

// By level. build.sh gives AVX-VNNI's kernels the encoding of AVX-512, so that they are tested where that is.
static const Kernels* (*const MAKERS[LEVELS])(Dtype) = {
    portable_kernels,
#if defined(TP_X86)
    avx2_kernels,     avx_vnni_kernels, avx512_kernels, avx512_vnni_kernels, avx512_bf16_kernels, amx_kernels,
#elif defined(TP_ARM)
    nullptr,          nullptr, nullptr, nullptr, nullptr, nullptr, neon_kernels, dotprod_kernels, i8mm_kernels,
#endif
};

static std::vector<Candidate> levels() {
    std::vector<Candidate> all;
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
        for (int level = PORTABLE; level < LEVELS; level++)
            if (has_level(level) && MAKERS[level](dtype)) all.push_back({MAKERS[level](dtype), dtype, level});
    }
    return all;
}

// Those that the products of disentangled attention are computed with, as api.cpp chooses them.
static const Kernels* distance_kernels(const Kernels& k) {
    for (const Candidate& candidate : levels())
        if (candidate.kernels == &k) {
            const Dtype dtype = candidate.dtype == Dtype::float32 ? Dtype::float32 : Dtype::bfloat16;
            for (int level = candidate.level; level >= PORTABLE; level--)
                if (MAKERS[level] && MAKERS[level](dtype)) return MAKERS[level](dtype);
        }
    return nullptr;
}

extern "C" {
Encoder* tp_encoder_new(int, int, const Shape*);
void tp_encoder_free(Encoder*);
int tp_encoder_set_linear(Encoder*, int, int, const float*, const float*, const float*, int, int);
int tp_encoder_get_linear(const Encoder*, int, int, float*, float*, float*, int, int);
int tp_encoder_set_norm(Encoder*, int, int, const float*, const float*, int);
int tp_encoder_set_table(Encoder*, int, const void*, int, int, int);
int64_t tp_encoder_workspace_bytes(const Encoder*, const Request*);
int tp_encoder_forward(const Encoder*, Request*);
ContextMaps* tp_context_new(const Encoder*, const int32_t*, int, int, const float*, const float*, const float*,
                            const float*);
void tp_context_free(ContextMaps*);
struct Head;
Head* tp_linear_new(int, int, const float*, const float*, const float*, int, int);
void tp_linear_free(Head*);
int tp_linear_apply(const Head*, const float*, int, float*, int);
const char* tp_last_error();
}

static double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

static void check_product(const Candidate& level, int rows, int in, int out) {
    const Kernels& k = *level.kernels;
    if (!k.holds(in, out)) return;
    const std::string name =
        level.name() + " " + std::to_string(rows) + "×" + std::to_string(in) + "×" + std::to_string(out);
    const auto x = random_numbers((size_t)rows * in), w = random_numbers((size_t)out * in, 0.1f),
               b = random_numbers(out), other = random_numbers((size_t)(rows + 3) * out);
    Slabs slabs(0);
    const Linear linear = pack_linear(k, slabs, w.data(), b.data(), nullptr, in, out);
    std::vector<int> index(rows), residual_index(rows);
    for (int r = 0; r < rows; r++) index[r] = rows - 1 - r, residual_index[r] = r + 3;
    Exact packed(k.packed_rows_bytes(rows, in)), scratch(k.product_scratch(rows, in, out)), scale(rows * sizeof(float));
    k.enter();
    for (int part = 0; part < rows; part += 16)  // as threads would
        k.pack_rows(x.data(), false, in, index.data(), part, std::min(rows, part + 16), rows, in, packed.data,
                    (float*)scale.data);
    std::vector<double> expected((size_t)rows * out);
    double largest = 0;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < out; n++) {
            double sum = b[n];
            for (int i = 0; i < in; i++) sum += (double)x[(size_t)index[r] * in + i] * w[(size_t)n * in + i];
            expected[(size_t)r * out + n] = sum;
            largest = std::max(largest, std::fabs(sum));
        }
    auto run = [&](Epilogue epilogue, void* to, int parts) {
        const int count = panels(k, linear);
        for (int part = 0; part < parts; part++)
            k.multiply({&linear, packed.data, (float*)scale.data, rows, count * part / parts,
                        count * (part + 1) / parts, epilogue, Activation::gelu, to, (size_t)out, other.data(),
                        residual_index.data(), scratch.data});
    };
    auto compare = [&](const std::string& what, auto actual, auto wanted) {
        double worst = 0;
        for (size_t i = 0; i < expected.size(); i++)
            worst = std::max(worst, std::fabs((double)actual(i) - wanted(i)) / (1 + largest));
        check(worst <= level.tolerance(), name + " " + what + ": " + std::to_string(worst));
    };
    Exact floats((size_t)rows * out * 4), exchange((size_t)rows * out * (k.half ? 2 : 4));
    const float* f = (const float*)floats.data;
    auto plain = [&](size_t i) { return expected[i]; };
    auto exchanged = [&](size_t i) {
        return k.half ? from_half(((uint16_t*)exchange.data)[i]) : ((float*)exchange.data)[i];
    };
    run(Epilogue::store_float, floats.data, 1);
    compare("store_float", [&](size_t i) { return f[i]; }, plain);
    std::vector<float> whole(f, f + expected.size());
    run(Epilogue::store_float, floats.data, 3);
    check(std::memcmp(whole.data(), f, whole.size() * 4) == 0, name + " in parts");
    run(Epilogue::residual, floats.data, 2);
    compare(
        "residual", [&](size_t i) { return f[i]; },
        [&](size_t i) { return expected[i] + other[(size_t)residual_index[i / out] * out + i % out]; });
    run(Epilogue::store, exchange.data, 2);
    compare("store", exchanged, plain);
    run(Epilogue::activate_store, exchange.data, 1);
    compare("activate_store", exchanged, [&](size_t i) { return gelu(expected[i]); });
    if (!k.quantized) {  // packed rows of the next product, seen through an identity matrix
        std::vector<float> identity((size_t)out * out), zero(out);
        for (int i = 0; i < out; i++) identity[(size_t)i * out + i] = 1;
        const Linear next = pack_linear(k, slabs, identity.data(), nullptr, nullptr, out, out);
        Exact inner(k.packed_rows_bytes(rows, out)), more(k.product_scratch(rows, out, out));
        run(Epilogue::activate_pack, inner.data, 2);
        k.multiply({&next, inner.data, nullptr, rows, 0, panels(k, next), Epilogue::store_float, Activation::gelu,
                    floats.data, (size_t)out, nullptr, nullptr, more.data});
        compare("activate_pack", [&](size_t i) { return f[i]; }, [&](size_t i) { return gelu(expected[i]); });
    }
    k.leave();
}

// What is added to logits: nothing, a bias by distance, a window, disentangled attention by queries and by keys, or
// some of these; tokens have left in between if `apart`.
struct Terms {
    bool bias = false, apart = false;
    int window = -1, far = 9;
    bool by_queries = false, by_keys = false;
};

// Columns for the distances from -far to far, which rise by less than one now and then.
static std::vector<int32_t> random_columns(int far) {
    std::vector<int32_t> columns(1, 0);
    for (int i = 0; i < 2 * far; i++) columns.push_back(columns.back() + (generator() % 4 != 0));
    return columns;
}

// Whole numbers, of which every sum is exact in float32: each result must be right to the last bit. For int8 they are
// as large as they can be, so that an instruction that saturates, or an offset that is not taken back, is found out.
enum Pattern { SAME, OPPOSITE, ALTERNATING, RANDOM, PATTERNS };

static void check_exact(const Candidate& level, int rows, int in, int out, Pattern pattern) {
    const Kernels& k = *level.kernels;
    if (!k.holds(in, out)) return;
    const std::string name = level.name() + " whole numbers " + std::to_string(rows) + "×" + std::to_string(in) + "×" +
                             std::to_string(out) + ", pattern " + std::to_string(pattern);
    const float most = level.dtype == Dtype::int8 ? 127 : 7;
    auto number = [&](size_t i, bool of_weight) {
        if (pattern == SAME) return most;
        if (pattern == OPPOSITE) return of_weight ? -most : most;
        if (pattern == ALTERNATING) return i % 2 ? -most : most;
        return (float)((int)(generator() % 3) - 1) * (generator() % 4 ? most : 3);
    };
    std::vector<float> x((size_t)rows * in), w((size_t)out * in), given(out, 0.5f), weight(w.size()), bias(out),
        scale(out);
    for (size_t i = 0; i < x.size(); i++) x[i] = i % in == 0 ? most : number(i % in, false);
    for (size_t i = 0; i < w.size(); i++) w[i] = i % in == 0 ? -most : number(i % in + i / in, true);
    Slabs slabs(0);
    const Linear linear = pack_linear(k, slabs, w.data(), nullptr, k.quantized ? given.data() : nullptr, in, out);
    unpack_linear(k, linear, weight.data(), bias.data(), scale.data());
    bool near = true;
    for (size_t i = 0; i < w.size(); i++) {
        const float is = weight[i] * (k.quantized ? scale[i / in] : 1), was = w[i] * (k.quantized ? 0.5f : 1);
        near &= std::fabs(is - was) <= (k.quantized ? 0.51f * scale[i / in] : 0);
        near &= !k.quantized || std::fabs(weight[i]) <= 127;
    }
    check(near, name + ": the weights");
    const int spoilt = rows > 1 ? (int)(generator() % (unsigned)rows) : -1;  // a row that is not finite
    if (spoilt >= 0) x[(size_t)spoilt * in + generator() % (unsigned)in] = rows % 2 ? std::nanf("") : -INFINITY;
    Exact packed(k.packed_rows_bytes(rows, in)), scratch(k.product_scratch(rows, in, out)), row_scale(rows * 4),
        found((size_t)rows * out * 4);
    k.enter();
    k.pack_rows(x.data(), false, in, nullptr, 0, rows, rows, in, packed.data, (float*)row_scale.data);
    k.multiply({&linear, packed.data, (float*)row_scale.data, rows, 0, panels(k, linear), Epilogue::store_float,
                Activation::gelu, found.data, (size_t)out, nullptr, nullptr, scratch.data});
    k.leave();
    bool exact = true, lost = false;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < out; n++) {
            const float value = ((float*)found.data)[(size_t)r * out + n];
            if (r == spoilt) {
                lost |= std::isfinite(value) && level.dtype == Dtype::int8;
                continue;
            }
            long sum = 0;
            for (int i = 0; i < in; i++) sum += (long)x[(size_t)r * in + i] * (long)weight[(size_t)n * in + i];
            exact &= value == (float)sum * (k.quantized ? scale[n] : 1);
        }
    check(exact, name + ": a sum");
    check(!lost, name + ": what is not finite was lost");
}

static void check_attention(const Candidate& level, int keys, int queries, int head_size, Terms terms = {}) {
    const Kernels& k = *level.kernels;
    if (!k.fits(64, 64, head_size)) return;
    const std::string name = level.name() + " attention of " + std::to_string(keys) + " keys, head size " +
                             std::to_string(head_size) + (terms.bias ? " with a bias" : "") +
                             (terms.window < 0 ? "" : " in a window of " + std::to_string(terms.window)) +
                             (terms.by_queries ? " by queries" : "") + (terms.by_keys ? " by keys" : "") +
                             (terms.apart ? ", some gone" : "");
    const auto q = random_numbers((size_t)queries * head_size), key = random_numbers((size_t)keys * head_size),
               value = random_numbers((size_t)keys * head_size);
    const size_t wide = k.half ? 2 : 4;
    Exact xq(q.size() * wide), xk(key.size() * wide), xv(value.size() * wide), context(q.size() * wide),
        received(keys * sizeof(float)), scratch(k.attention_scratch(keys, head_size));
    auto fill = [&](void* to, const std::vector<float>& from) {
        for (size_t i = 0; i < from.size(); i++)
            k.half ? (void)(((uint16_t*)to)[i] = half(from[i])) : (void)(((float*)to)[i] = from[i]);
    };
    fill(xq.data, q), fill(xk.data, key), fill(xv.data, value);
    const float scale = 1 / std::sqrt((float)head_size);
    // Queries are the last of the keys.
    Exact places(keys * sizeof(int)), table((2 * (terms.far + BIAS_EDGE) + 1) * sizeof(float));
    int* place = (int*)places.data;
    for (int j = 0, at = 5; j < keys; j++) place[j] = at, at += terms.apart && generator() % 3 == 0 ? 4 : 1;
    const auto numbers = random_numbers(2 * terms.far + 1);
    auto bias = [&](int distance) { return numbers[std::max(-terms.far, std::min(distance, terms.far)) + terms.far]; };
    LogitTerms given;
    const int wide_far = terms.far + BIAS_EDGE;
    for (int i = -wide_far; i <= wide_far; i++) ((float*)table.data)[i + wide_far] = bias(i);
    if (terms.bias || terms.window >= 0)
        given = {place + keys - queries, place, terms.window, terms.bias ? (float*)table.data : nullptr, wide_far, {}};
    const std::vector<int32_t> column = random_columns(terms.far);
    const size_t stride = column.back() + 1 + DISTANCE_EDGE;
    Exact columns((column.size() + DISTANCE_EDGE) * 4), of_queries(queries * stride * 4), of_keys(keys * stride * 4);
    std::memcpy(columns.data, column.data(), column.size() * 4);
    for (size_t i = 0; i < queries * stride; i++) ((float*)of_queries.data)[i] = random_numbers(1)[0];
    for (size_t i = 0; i < keys * stride; i++) ((float*)of_keys.data)[i] = random_numbers(1)[0];
    if (terms.by_queries || terms.by_keys) {
        given.query_places = place + keys - queries, given.key_places = place;
        given.distance = {terms.by_queries ? (float*)of_queries.data : nullptr,
                          terms.by_keys ? (float*)of_keys.data : nullptr, stride, (int32_t*)columns.data, terms.far};
    }
    k.enter();
    k.attend({xq.data, xk.data, xv.data, (size_t)head_size, (size_t)head_size, queries, keys, head_size, scale,
              context.data, (size_t)head_size, (float*)received.data, scratch.data, given});
    k.leave();
    std::vector<double> sums(keys), expected(q.size());
    for (int i = 0; i < queries; i++) {
        std::vector<double> p(keys);
        double top = -1e300, total = 0;
        for (int j = 0; j < keys; j++) {
            for (int d = 0; d < head_size; d++) p[j] += (double)q[i * head_size + d] * key[j * head_size + d];
            const int distance = place[keys - queries + i] - place[j];
            p[j] = p[j] * scale + (terms.bias ? bias(distance) : 0);
            const int by = column[std::max(-terms.far, std::min(distance, terms.far)) + terms.far];
            if (terms.by_queries) p[j] += ((float*)of_queries.data)[i * stride + by];
            if (terms.by_keys) p[j] += ((float*)of_keys.data)[j * stride + by];
            if (terms.window >= 0 && std::abs(distance) > terms.window) p[j] = -1e30;
            top = std::max(top, p[j]);
        }
        for (double& v : p) total += v = std::exp(v - top);
        for (int j = 0; j < keys; j++) {
            sums[j] += p[j] / total;
            for (int d = 0; d < head_size; d++) expected[i * head_size + d] += p[j] / total * value[j * head_size + d];
        }
    }
    double worst = 0, worst_sum = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double actual = k.half ? from_half(((uint16_t*)context.data)[i]) : ((float*)context.data)[i];
        worst = std::max(worst, std::fabs(actual - expected[i]));
    }
    for (int j = 0; j < keys; j++)
        worst_sum = std::max(worst_sum, std::fabs(((float*)received.data)[j] - sums[j]) / (1 + sums[j]));
    const double allowed = level.attends_in_half() ? 3e-2 : 1e-4;
    check(worst <= allowed, name + ": context " + std::to_string(worst));
    check(worst_sum <= allowed, name + ": received " + std::to_string(worst_sum));
}

// Rows of a product, as store_float has them: every row in one block of all. x is [rows, in], of bfloat16 if `half`.
static std::vector<float> multiplied(const Kernels& k, const Linear& linear, const void* x, int rows,
                                     bool half = false) {
    const int in = linear.in, out = linear.out;
    Exact packed(k.packed_rows_bytes(rows, in)), scratch(k.product_scratch(rows, in, out)), scale(rows * sizeof(float)),
        to((size_t)rows * out * sizeof(float));
    k.enter();
    k.pack_rows(x, half, in, nullptr, 0, rows, rows, in, packed.data, (float*)scale.data);
    k.multiply({&linear, packed.data, (float*)scale.data, rows, 0, panels(k, linear), Epilogue::store_float,
                Activation::gelu, to.data, (size_t)out, nullptr, nullptr, scratch.data});
    k.leave();
    return {(float*)to.data, (float*)to.data + (size_t)rows * out};
}

static bool same_bits(const float* a, const float* b, size_t count) { return std::memcmp(a, b, count * 4) == 0; }

// A product of any sizes, and what must hold beside it: a row is the same alone; int8 sums are exact; a NaN or infinity
// in a row or a weight stays in its row or column, and numbers near the largest and smallest stay finite.
static void check_tails(const Candidate& level, int rows, int in, int out) {
    const Kernels& k = *level.kernels;
    if (!k.holds(in, out)) return;
    const std::string name = level.name() + " " + std::to_string(rows) + "×" + std::to_string(in) + "×" +
                             std::to_string(out) + " of any sizes";
    const bool int8 = level.dtype == Dtype::int8;
    auto x = random_numbers((size_t)rows * in), w = random_numbers((size_t)out * in);
    if (int8)  // rows of whole numbers, whose scale is 1
        for (size_t i = 0; i < x.size(); i++)
            x[i] = i % in == 0 ? 127 : std::max(-127.0f, std::min(127.0f, std::rint(40 * x[i])));
    Slabs slabs(0);
    auto pack = [&](const std::vector<float>& weight) {
        return pack_linear(k, slabs, weight.data(), nullptr, nullptr, in, out);
    };
    const Linear linear = pack(w);
    std::vector<float> numbers(w.size()), bias(out), scale(out, 1.0f);
    unpack_linear(k, linear, numbers.data(), bias.data(), scale.data());
    const std::vector<float> found = multiplied(k, linear, x.data(), rows);
    double worst = 0;
    bool exact = true;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < out; n++) {
            double sum = 0, size = 0;
            for (int i = 0; i < in; i++) {
                const double term = (double)x[(size_t)r * in + i] * numbers[(size_t)n * in + i];
                sum += term, size += std::fabs(term);
            }
            const float value = found[(size_t)r * out + n];
            if (int8) exact &= value == (float)sum * scale[n];
            const double difference = std::fabs(value - sum) / (size + 1e-30);
            if (!int8) worst = difference <= worst ? worst : difference;  // NaN is worse than all
        }
    check(exact, name + ": sums are not exact");
    check(worst <= (level.dtype == Dtype::float32 ? 1e-6 : 5e-3), name + ": " + std::to_string(worst));
    const int some = (int)(generator() % (unsigned)rows), column = (int)(generator() % (unsigned)out);
    const float* row = x.data() + (size_t)some * in;
    check(same_bits(multiplied(k, linear, row, 1).data(), found.data() + (size_t)some * out, out),
          name + ": a row is not what it is alone");
    for (float odd : {std::nanf(""), INFINITY, -INFINITY}) {
        auto broken = x, weight = w;
        broken[(size_t)some * in + generator() % (unsigned)in] = odd;
        const std::vector<float> by_row = multiplied(k, linear, broken.data(), rows);
        weight[(size_t)column * in + generator() % (unsigned)in] = odd;
        const std::vector<float> by_column = multiplied(k, pack(weight), x.data(), rows);
        bool good = true;
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < out; n++) {
                const size_t i = (size_t)r * out + n;
                good &= r == some ? !std::isfinite(by_row[i]) : same_bits(&by_row[i], &found[i], 1);
                good &= n == column ? !std::isfinite(by_column[i]) : same_bits(&by_column[i], &found[i], 1);
            }
        check(good, name + ": what " + std::to_string(odd) + " in a row or a column gives");
    }
    for (float size : {1e-37f, 1e30f}) {
        auto extreme = x, weight = w;
        for (float& v : extreme) v *= size;
        for (float& v : weight) v /= size;
        bool good = true;
        for (float v : multiplied(k, pack(weight), extreme.data(), rows)) good &= std::isfinite(v);
        check(good, name + ": not finite with rows of about " + std::to_string(size));
    }
}

// Rows as they are packed, seen through an identity matrix: no further from what they were than rounding takes them.
static void check_rounding(const Candidate& level, int size) {
    const Kernels& k = *level.kernels;
    if (!k.holds(size, size)) return;
    const int rows = 3;
    const std::vector<float> x = random_numbers((size_t)rows * size);
    std::vector<float> identity((size_t)size * size);
    for (int i = 0; i < size; i++) identity[(size_t)i * size + i] = 1;
    Slabs slabs(0);
    const std::vector<float> found =
        multiplied(k, pack_linear(k, slabs, identity.data(), nullptr, nullptr, size, size), x.data(), rows);
    bool good = true;
    for (int r = 0; r < rows; r++) {
        float most = 0;
        for (int i = 0; i < size; i++) most = std::max(most, std::fabs(x[r * size + i]));
        for (int i = r * size; i < (r + 1) * size; i++) {
            const float allowed = level.dtype == Dtype::float32    ? 0
                                  : level.dtype == Dtype::bfloat16 ? std::fabs(x[i]) / 255
                                                                   : 0.501f * most / 127;
            good &= std::fabs(found[i] - x[i]) <= allowed;
        }
    }
    check(good, level.name() + " rounds rows of " + std::to_string(size));
    if (!k.half) return;
    std::vector<uint16_t> halves(x.size());
    std::vector<float> widened(x.size());
    for (size_t i = 0; i < x.size(); i++) halves[i] = half(x[i]), widened[i] = from_half(halves[i]);
    const Linear linear = pack_linear(k, slabs, identity.data(), nullptr, nullptr, size, size);
    check(multiplied(k, linear, halves.data(), rows, true) == multiplied(k, linear, widened.data(), rows),
          level.name() + " packs rows of " + std::to_string(size) + " bfloat16");
}

// The largest sums of int8 that may come: all products are the same, and as large as can be.
static void check_largest_sums(const Candidate& level) {
    const Kernels& k = *level.kernels;
    const int in = 1 << 17, out = k.whole_panels ? k.panel : 3;
    if (level.dtype != Dtype::int8 || !k.fits(in, in, 32)) return;
    for (float sign : {1.0f, -1.0f}) {
        const std::vector<float> x(in, 127.0f), w((size_t)out * in, sign);
        Slabs slabs(0);
        const Linear linear = pack_linear(k, slabs, w.data(), nullptr, nullptr, in, out);
        for (float v : multiplied(k, linear, x.data(), 1))
            check(std::fabs(v / (sign * 127.0f * in) - 1) < 1e-6, level.name() + " with the largest sums");
    }
    check(!k.fits(in + 1, in, 32), level.name() + " fits what could overflow");
}

// Every size from 1 to 65, of everything that has a tail, and a few that make several blocks.
static void check_shapes(const Candidate& level) {
    for (int n = 1; n <= 65; n++) {
        check_product(level, n, 64, 32), check_product(level, 5, n, 21), check_product(level, 3, 19, n);
        check_tails(level, n, 37, 11), check_tails(level, 7, n, 13), check_tails(level, 2, 64, n);
        check_rounding(level, n);
        check_attention(level, n, n, 20), check_attention(level, 11, 9, n), check_attention(level, 65, n, 32);
    }
    for (int size : {96, 160, 256, 800}) check_rounding(level, size);
    for (int in : {767, 768, 769, 1535, 1537, 3080}) check_tails(level, 13, in, 9), check_tails(level, 1, in, 2);
    check_largest_sums(level);
}

// What tokens that left go on giving, see ContextMaps: the same numbers for the encoder and for the reference.
struct Context {
    typedef std::vector<double> Row;
    int rank = 0, hidden = 0, given = 0;
    std::vector<int32_t> layers;                      // those that have a `down`, rising: 0 for tokens outside
    std::vector<float> down, down_bias, up, up_bias;  // [layers, rank, hidden], [all layers, given, rank]
    Context(const Shape& shape, int rank, std::vector<int32_t> layers)
        : rank(rank), hidden(shape.hidden), given(2 * shape.key_size()), layers(layers) {
        const size_t codes = layers.size() * rank, all = (size_t)shape.layers * given;
        down = random_numbers(codes * hidden, 1 / std::sqrt((float)hidden)), down_bias = random_numbers(codes, 0.1f);
        up = random_numbers(all * rank, 1 / std::sqrt((float)rank)), up_bias = random_numbers(all, 0.1f);
    }
    bool has(int layer) const { return std::count(layers.begin(), layers.end(), layer); }
    std::unique_ptr<ContextMaps, void (*)(ContextMaps*)> build(const Encoder& encoder) const {
        return {tp_context_new(&encoder, layers.data(), (int)layers.size(), rank, down.data(), down_bias.data(),
                               up.data(), up_bias.data()),
                tp_context_free};
    }
    static Row apply(const float* weight, const float* bias, const Row& x, int out) {
        Row y(bias, bias + out);
        for (int n = 0; n < out; n++)
            for (size_t i = 0; i < x.size(); i++) y[n] += x[i] * weight[n * x.size() + i];
        return y;
    }
    Row code(int layer, const Row& state) const {
        const size_t which = std::find(layers.begin(), layers.end(), layer) - layers.begin();
        return apply(down.data() + which * rank * hidden, down_bias.data() + which * rank, state, rank);
    }
    // All its keys, and then all its values.
    Row gives(int layer, const Row& code) const {
        return apply(up.data() + (size_t)layer * given * rank, up_bias.data() + (size_t)layer * given, code, given);
    }
};

// How a pass decides. Decisions of the caller are random, but always the same for the same layer and token.
struct Decisions {
    const float* thresholds = nullptr;
    const uint8_t* prunes = nullptr;
    float divisor = 0;
    bool caller = false, summarize = false, by_segment = true;
    const uint8_t *stays = nullptr, *asks = nullptr;  // [tokens]
    const float* probes = nullptr;                    // [layers, hidden + 1]
    const uint8_t* probed = nullptr;
    const Context* context = nullptr;
    const uint8_t* outside = nullptr;  // [tokens]
    bool unread = false;               // what left has no last norm
    // The same for a sequence that begins with this token.
    Decisions from(int token) const {
        Decisions moved = *this;
        if (stays) moved.stays += token;
        if (asks) moved.asks += token;
        if (outside) moved.outside += token;
        return moved;
    }
    static bool keeps(int layer, int token) {
        return ((unsigned)(layer * 7919 + token * 104729 + 12345) * 2654435761u >> 16) % 3 != 0;
    }
};

// BERT's kind of layer.
static Shape post_norm(int layers, int hidden, int heads, int inner, Activation activation) {
    const int size = hidden / heads;
    return {layers,     hidden, heads, heads, size, inner, 1e-5f, 1 / std::sqrt((float)size),
            activation, false,  false, false};
}

// A whole encoder with random weights, and the same in double precision one sequence at a time.
struct Model {
    Shape shape = post_norm(3, 64, 2, 128, Activation::gelu);
    int words = 50, positions = 520, size = 32;
    std::vector<float> word, position, type, gamma, beta, inner_gamma, inner_beta;  // the last two: the embeddings'
    std::vector<std::vector<float>> weights, biases;
    std::vector<std::pair<int, int>> sizes;  // in, out
    // What only some families have.
    std::vector<Step> steps;
    std::vector<Rotation> rotations;
    std::vector<float> bias, last_gamma, last_beta;  // bias [heads, 2 · far + 1]
    int far = 0;
    std::vector<int32_t> columns;                         // of disentangled attention
    std::vector<std::vector<float>> of_queries, of_keys;  // per layer [heads, columns, head size], or nothing
    bool embeds_positions = true, normalizes_embeddings = true, normalizes_projected = false;
    Model() { fill(); }
    Model(Shape shape, int size) : shape(shape), positions(260), size(size) { fill(); }
    // Where in the text a sequence's token stands: some are missing.
    static int place(int token) { return token + token / 3; }
    bool projects() const { return size != shape.hidden; }
    void fill() {
        word = random_numbers(words * size), position = random_numbers(positions * size);
        type = random_numbers(2 * size), gamma = random_numbers(shape.hidden), beta = random_numbers(shape.hidden);
        inner_gamma = random_numbers(size), inner_beta = random_numbers(size);
        auto add = [&](int in, int out) {
            const float scale = 1.2f / std::sqrt((float)in);
            sizes.push_back({in, out});
            weights.push_back(random_numbers((size_t)in * out, scale)), biases.push_back(random_numbers(out, 0.1f));
        };
        add(size, shape.hidden);
        for (int l = 0; l < shape.layers; l++) {
            add(shape.hidden, shape.query_size());
            for (int i = 0; i < 2; i++) add(shape.hidden, shape.key_size());
            add(shape.query_size(), shape.hidden);
            add(shape.hidden, shape.inner), add(shape.inner, shape.hidden);
            if (shape.gated) add(shape.hidden, shape.inner);
            steps.push_back({l});
        }
    }
    int linears() const { return shape.gated ? 7 : 6; }  // of a layer

    // A model with some of what only some families have.
    template <class Pick>
    static Model any(Shape shape, int size, Pick pick) {
        auto one_in = [&](int n) { return pick(1, n) == 1; };
        const int groups = shape.heads % 2 == 0 && one_in(2) ? 2 : one_in(2) ? shape.heads : 1;
        shape.key_heads = shape.heads / groups;
        if (one_in(3)) shape.head_size *= 2, shape.scale = 0.3f;
        shape.norm_first = one_in(2), shape.rms_norm = one_in(3), shape.gated = one_in(2);
        Model model(shape, size);
        for (Step& step : model.steps) {
            if (one_in(3)) step.weights = pick(0, shape.layers - 1);
            if (one_in(2)) step.window = pick(0, 12);
        }
        for (int r = 0; shape.head_size % 2 == 0 && r < 2; r++) {
            model.rotations.push_back({{}, one_in(2) ? 1.0f : 1.2f});
            for (int i = 0; i < shape.head_size / 2; i++)
                model.rotations[r].frequencies.push_back((float)pick(1, 1000) / 1000);
        }
        for (Step& step : model.steps)
            if (!model.rotations.empty()) step.rotation = pick(-1, 1);
        if (one_in(2)) model.far = pick(0, 9), model.bias = random_numbers(shape.heads * (2 * model.far + 1));
        if (one_in(2)) model.last_gamma = random_numbers(shape.hidden), model.last_beta = random_numbers(shape.hidden);
        model.embeds_positions = one_in(2), model.normalizes_embeddings = one_in(2);
        model.normalizes_projected = model.projects() && one_in(2);
        if (one_in(3)) {
            model.columns = random_columns(pick(0, 2) * pick(0, 20));
            const size_t count = (size_t)shape.heads * (model.columns.back() + 1) * shape.head_size;
            const int which = pick(0, 2);  // by queries, by keys, both
            const float scale = shape.scale / std::sqrt((float)shape.head_size);
            for (int l = 0; l < shape.layers; l++) {
                model.of_queries.push_back(random_numbers(which != 1 ? count : 0, scale));
                model.of_keys.push_back(random_numbers(which != 0 ? count : 0, scale));
            }
        }
        return model;
    }

    std::unique_ptr<Encoder> build(const Kernels& k) const {
        auto encoder = std::make_unique<Encoder>(k, shape);
        Slabs& memory = encoder->memory;
        auto linear = [&](int i) {
            return pack_linear(k, memory, weights[i].data(), biases[i].data(), nullptr, sizes[i].first,
                               sizes[i].second);
        };
        auto table = [&](const std::vector<float>& values) {
            char* place = memory.take(values.size() * 4);
            std::memcpy(place, values.data(), values.size() * 4);
            return place;
        };
        Embeddings& e = encoder->embeddings;
        e.word = table(word), e.type = table(type);
        if (embeds_positions) e.position = table(position), e.positions = positions;
        e.size = size, e.words = words, e.types = 2;
        if (normalizes_embeddings) e.norm = {inner_gamma, inner_beta};
        encoder->steps = steps, encoder->rotations = rotations, encoder->last_norm = {last_gamma, last_beta};
        if (!bias.empty()) encoder->set_bias(bias.data(), far);
        encoder->distance_kernels = distance_kernels(k);
        if (!columns.empty()) encoder->set_distances(columns.data(), (int)columns.size() / 2);
        if (normalizes_projected) e.projected_norm = {gamma, beta};
        auto products = [&](const std::vector<float>& values) {
            std::vector<Linear> heads;
            const size_t one = values.size() / shape.heads;
            for (int head = 0; one && head < shape.heads; head++)
                heads.push_back(pack_linear(*encoder->distance_kernels, memory, values.data() + head * one, nullptr,
                                            nullptr, shape.head_size, encoder->distances.count()));
            return heads;
        };
        if (projects()) e.projection = linear(0);
        for (int l = 0, i = 1; l < shape.layers; l++) {
            Layer& layer = encoder->layers[l];
            for (Linear* to : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down})
                *to = linear(i++);
            if (shape.gated) layer.gate = linear(i++);
            layer.attention_norm = layer.output_norm = {gamma, beta};
            if (!columns.empty()) layer.distance = {products(of_queries[l]), products(of_keys[l])};
        }
        return encoder;
    }

    typedef std::vector<double> Row;
    Row apply(int i, const Row& x) const {
        Row y(sizes[i].second);
        for (size_t n = 0; n < y.size(); n++) {
            y[n] = biases[i][n];
            for (size_t j = 0; j < x.size(); j++) y[n] += x[j] * weights[i][n * x.size() + j];
        }
        return y;
    }
    Row norm(Row x, const std::vector<float>& by, const std::vector<float>& plus) const {
        double mean = 0, variance = 0;
        for (double v : x) mean += shape.rms_norm ? 0 : v / x.size();
        for (double v : x) variance += (v - mean) * (v - mean) / x.size();
        for (size_t i = 0; i < x.size(); i++)
            x[i] = (x[i] - mean) / std::sqrt(variance + shape.epsilon) * by[i] + plus[i];
        return x;
    }
    Row norm(const Row& x) const { return norm(x, gamma, beta); }
    double activate(double x) const {
        if (shape.activation == Activation::relu) return std::max(x, 0.0);
        if (shape.activation == Activation::gelu) return gelu(x);
        if (shape.activation == Activation::silu) return x / (1 + std::exp(-x));
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    }

    // Every token's last state, the layers it survived, what each layer decided by (NaN where it did not), and how near
    // a decision came to going the other way. With `summarize` what is dropped becomes a summary token for each half of
    // the sequence, a row with `alive` -1 or -2. With context what left, or never entered, is one of `others`.
    double reference(const std::vector<int>& ids, const Decisions& by, std::vector<Row>& out,
                     std::vector<int>& survived, std::vector<Row>& decided) const {
        double weights[2] = {0, 0};
        int hosts[2] = {-1, -1};  // the tokens whose rows carry the summaries
        const int heads = shape.heads, part = shape.head_size;
        double margin = 1;
        std::vector<Row> x;
        std::vector<int> alive;
        struct Other {
            int token;
            Row code;
        };
        std::vector<Other> others;
        out.assign(ids.size(), {}), survived.assign(ids.size(), 0);
        auto leaves = [&](int token, const Row& state, int down) {
            out[token] = by.unread ? state : last(state);
            if (by.context && by.context->has(down)) others.push_back({token, by.context->code(down, state)});
        };
        for (size_t t = 0; t < ids.size(); t++) {
            Row row(size);
            for (int i = 0; i < size; i++)
                row[i] = (double)word[ids[t] * size + i] + type[i] + (embeds_positions ? position[t * size + i] : 0);
            if (normalizes_embeddings) row = norm(row, inner_gamma, inner_beta);
            if (projects()) row = apply(0, row);
            if (normalizes_projected) row = norm(row);
            if (by.outside && by.outside[t])
                leaves((int)t, row, 0), survived[t] = -1;
            else
                x.push_back(row), alive.push_back((int)t);
        }
        decided.assign(shape.layers, Row(ids.size(), std::nan("")));
        for (int l = 0; l < shape.layers; l++) {
            const Step& step = steps[l];
            const int base = 1 + linears() * step.weights, n = (int)x.size();
            std::vector<Row> q, k, v, context(n, Row(shape.query_size()));
            for (const Row& row : x) {
                const Row entering = shape.norm_first ? norm(row) : row;
                q.push_back(apply(base, entering)), k.push_back(apply(base + 1, entering));
                v.push_back(apply(base + 2, entering));
            }
            auto token_of = [&](int row) { return alive[row] < 0 ? hosts[-1 - alive[row]] : alive[row]; };
            std::vector<int> asking;
            for (int i = 0; by.asks && i < n; i++)
                if (by.asks[token_of(i)]) asking.push_back(i);
            if (asking.empty())
                for (int i = 0; i < n; i++) asking.push_back(i);
            for (int i = 0; i < n; i++)
                if (step.rotation >= 0) turn(q[i], token_of(i), step.rotation), turn(k[i], token_of(i), step.rotation);
            // Keys and values go on after the rows that are there with those of the others, which ask nothing.
            std::vector<int> key_tokens;
            for (int i = 0; i < n; i++) key_tokens.push_back(token_of(i));
            for (const Other& other : others) {
                const Row given = by.context->gives(l, other.code);
                k.push_back({given.begin(), given.begin() + shape.key_size()});
                if (step.rotation >= 0) turn(k.back(), other.token, step.rotation);
                v.push_back({given.begin() + shape.key_size(), given.end()}), key_tokens.push_back(other.token);
            }
            const int keys = (int)k.size();
            Row received(keys);
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < n; i++) {
                    Row p(keys);
                    double top = -1e300, total = 0;
                    const int shared = h / (heads / shape.key_heads) * part;
                    for (int j = 0; j < keys; j++) {
                        for (int d = 0; d < part; d++) p[j] += q[i][h * part + d] * k[j][shared + d] * shape.scale;
                        const int distance = place(token_of(i)) - place(key_tokens[j]);
                        if (!bias.empty()) p[j] += bias[h * (2 * far + 1) + far + std::clamp(distance, -far, far)];
                        if (!columns.empty()) p[j] += disentangled(step.weights, h, distance, q[i], k[j], shared);
                        if (step.window >= 0 && std::abs(distance) > step.window) p[j] = -1e30;
                        top = std::max(top, p[j]);
                    }
                    for (double& e : p) total += e = std::exp(e - top);
                    const bool asks = std::count(asking.begin(), asking.end(), i);
                    for (int j = 0; j < keys; j++) {
                        if (asks) received[j] += p[j] / total / heads * n / asking.size();
                        for (int d = 0; d < part; d++) context[i][h * part + d] += p[j] / total * v[j][shared + d];
                    }
                }
            std::vector<Row> next, merged(2, Row(shape.hidden));
            std::vector<int> left;
            double gathered[2] = {0, 0};
            auto finish = [&](const Row& attended, int token) {
                const Row entering = shape.norm_first ? norm(attended) : attended;
                Row inner = apply(base + 4, entering);
                if (shape.gated) {
                    const Row gate = apply(base + 6, entering);
                    for (int d = 0; d < shape.inner; d++) inner[d] *= activate(gate[d]);
                } else {
                    for (double& e : inner) e = activate(e);
                }
                Row after = apply(base + 5, inner);
                for (int d = 0; d < shape.hidden; d++) after[d] += attended[d];
                next.push_back(shape.norm_first ? after : norm(after)), left.push_back(token);
            };
            for (int i = 0; i < n; i++) {
                Row attended = apply(base + 3, context[i]);
                for (int d = 0; d < shape.hidden; d++) attended[d] += x[i][d];
                if (!shape.norm_first) attended = norm(attended);
                const bool summary = alive[i] < 0, by_probe = by.probed && by.probed[l];
                double score = received[i];
                if (by_probe) {
                    const float* probe = by.probes + l * (shape.hidden + 1);
                    score = probe[shape.hidden];
                    for (int d = 0; d < shape.hidden; d++) score += attended[d] * probe[d];
                }
                if ((by.caller || by.thresholds) && by.prunes[l]) decided[l][token_of(i)] = score;
                double distance = 1;
                if (by.caller && by.prunes[l] && !summary)
                    distance = Decisions::keeps(l, alive[i]) ? 1 : -1;
                else if (by.thresholds && by.prunes[l])
                    distance = score / (by_probe ? 1 : by.divisor > 0 ? by.divisor : n) - by.thresholds[l];
                const bool may_leave = i && !summary && !(by.stays && by.stays[alive[i]]);
                if (may_leave) margin = std::min(margin, std::fabs(distance));
                const bool dropped = may_leave && distance < 0;
                if (dropped) leaves(alive[i], attended, l + 1);
                if (by.summarize && (summary || dropped)) {
                    const int which = summary ? -1 - alive[i] : by.by_segment ? alive[i] >= (int)ids.size() / 2 : 0;
                    const double weight = summary ? weights[which] : std::max(received[i], 1e-6);
                    if (hosts[which] < 0) hosts[which] = alive[i];
                    for (int d = 0; d < shape.hidden; d++) merged[which][d] += weight * attended[d];
                    gathered[which] += weight;
                } else if (!dropped) {
                    finish(attended, alive[i]), survived[alive[i]]++;
                }
            }
            for (int which = 0; which < 2; which++) {
                if (gathered[which] == 0 || l + 1 == shape.layers) continue;  // nobody would attend to it
                for (double& e : merged[which]) e /= gathered[which];
                weights[which] = gathered[which];
                finish(merged[which], -1 - which);
            }
            x = next, alive = left;
        }
        for (size_t i = 0; i < x.size(); i++)
            if (alive[i] >= 0) out[alive[i]] = last(x[i]);
        return margin;
    }
    // What disentangled attention adds for a query and a key at a distance; the key's head begins at `shared`.
    double disentangled(int layer, int head, int distance, const Row& query, const Row& key, int shared) const {
        const int most = (int)columns.size() / 2, part = shape.head_size;
        const int column = columns[std::clamp(distance, -most, most) + most];
        const size_t at = ((size_t)head * (columns.back() + 1) + column) * part;
        double sum = 0;
        for (int d = 0; d < part; d++) {
            if (!of_queries[layer].empty()) sum += query[head * part + d] * of_queries[layer][at + d];
            if (!of_keys[layer].empty()) sum += key[shared + d] * of_keys[layer][at + d];
        }
        return sum;
    }
    Row last(const Row& x) const { return last_gamma.empty() ? x : norm(x, last_gamma, last_beta); }
    // Turns every head of a token's queries, or keys.
    void turn(Row& x, int token, int which) const {
        const Rotation& rotation = rotations[which];
        const int half = shape.head_size / 2;
        for (size_t at = 0; at < x.size(); at += shape.head_size)
            for (int i = 0; i < half; i++) {
                const double angle = (double)token * rotation.frequencies[i], a = x[at + i], b = x[at + half + i];
                x[at + i] = (a * std::cos(angle) - b * std::sin(angle)) * rotation.factor;
                x[at + half + i] = (b * std::cos(angle) + a * std::sin(angle)) * rotation.factor;
            }
    }
};

// A whole forward pass, in a workspace of exactly the size that was asked for. `give_up`: after how many decisions of
// the caller it is left as it is; its memory is all that there was of it.
static bool run(const Encoder& encoder, Request& request, int give_up = 1 << 30) {
    request.tokens = request.cu_seqlens[request.sequences], request.layers = encoder.shape.layers;
    const size_t bytes = encoder.workspace_bytes(request);
    Exact workspace(bytes);
    request.workspace = (char*)workspace.data, request.workspace_bytes = bytes, request.waiting = false;
    for (int asked = 0; !encoder.forward(request); asked++) {
        if (asked == give_up) return false;
        int row = 0;
        for (int s = 0; s < request.sequences; s++)
            for (int t = request.cu_seqlens[s]; t < request.cu_seqlens[s + 1]; t++)
                if (request.survived[t] >= request.layer || (request.hosts && request.hosts[t]))
                    request.keep[row++] = Decisions::keeps(request.layer, t - request.cu_seqlens[s]);
        if (row != request.rows) throw std::logic_error("rows");
    }
    return true;
}

static void check_encoder(const Candidate& level, const Model& model, const std::vector<int>& lengths) {
    const auto encoder = model.build(*level.kernels);
    const int hidden = model.shape.hidden;
    std::vector<int32_t> ids, positions, cu_seqlens(1, 0);
    for (int length : lengths) {
        for (int i = 0; i < length; i++) ids.push_back((int)(generator() % model.words)), positions.push_back(i);
        cu_seqlens.push_back((int)ids.size());
    }
    const int tokens = (int)ids.size();
    std::vector<uint8_t> stays(tokens), asks(tokens);
    for (size_t s = 0; s < lengths.size(); s++)
        for (int i = 0; i < lengths[s]; i++)
            stays[cu_seqlens[s] + i] = i % 5 == 4, asks[cu_seqlens[s] + i] = i > 0 && i <= lengths[s] / 3;
    const std::vector<float> probes = random_numbers(3 * (hidden + 1), 1 / std::sqrt((float)hidden));
    const float by_attention[] = {0.0f, 0.0098f, 0.0123f}, by_probes[] = {0.0f, -0.8f, -0.5f};
    const float all_by_attention[] = {0.0085f, 0.0098f, 0.0123f};
    std::vector<uint8_t> outside(tokens), few(tokens);
    for (size_t s = 0; s < lengths.size(); s++)
        for (int i = 1; i < lengths[s]; i++)
            outside[cu_seqlens[s] + i] = i % 3 == 1 || i % 7 == 0, few[cu_seqlens[s] + i] = s % 2 == 0 && i % 40 == 39;
    const Context never(model.shape, 64, {0}), always(model.shape, 50, {0, 1, 2, 3}), some(model.shape, 64, {0, 2});
    enum Method { NONE, THRESHOLDS, SUMMARIES, ROLES, PROBES, OUTSIDE, CONTEXT, PROBED_CONTEXT };
    for (Method method : {NONE, THRESHOLDS, SUMMARIES, ROLES, PROBES, OUTSIDE, CONTEXT, PROBED_CONTEXT}) {
        const bool prune = method != NONE && method != OUTSIDE, summarize = method == SUMMARIES,
                   probe = method == PROBES || method == PROBED_CONTEXT;
        const float* thresholds = probe ? by_probes : method == CONTEXT ? all_by_attention : by_attention;
        const uint8_t prunes[] = {method == CONTEXT, 1, 1}, probed[] = {1, 1, probe};
        Decisions decisions;
        if (method == ROLES || method == CONTEXT) decisions.stays = stays.data(), decisions.asks = asks.data();
        if (probe) decisions.probes = probes.data(), decisions.probed = probed;
        if (method == OUTSIDE) decisions.context = &never, decisions.outside = outside.data();
        if (method == CONTEXT) decisions.context = &always, decisions.outside = few.data();
        if (method == PROBED_CONTEXT) decisions.context = &some, decisions.outside = outside.data();
        decisions.unread = method == CONTEXT;
        decisions.thresholds = prune ? thresholds : nullptr, decisions.prunes = prunes, decisions.summarize = summarize;
        std::vector<Model::Row> expected;
        std::vector<int> survived;
        std::vector<bool> clear;  // no decision near its threshold
        for (size_t s = 0; s < lengths.size(); s++) {
            std::vector<Model::Row> states, decided;
            std::vector<int> counts;
            const double margin = model.reference({ids.begin() + cu_seqlens[s], ids.begin() + cu_seqlens[s + 1]},
                                                  decisions.from(cu_seqlens[s]), states, counts, decided);
            expected.insert(expected.end(), states.begin(), states.end());
            survived.insert(survived.end(), counts.begin(), counts.end());
            const double rounding = level.dtype == Dtype::float32 ? 1e-6 : probe ? 0.1 : 1e-3;
            clear.push_back(!prune || margin > rounding);
        }
        std::vector<uint8_t> segments(tokens);
        for (size_t s = 0; s < lengths.size(); s++)
            for (int t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) segments[t] = t - cu_seqlens[s] >= lengths[s] / 2;
        std::unique_ptr<ContextMaps, void (*)(ContextMaps*)> maps(nullptr, tp_context_free);
        if (decisions.context) maps = decisions.context->build(*encoder);
        check(!decisions.context == !maps, level.name() + " context: " + tp_last_error());
        std::vector<float> once;
        for (bool first_only : {false, true})
            for (int threads : {1, 2, 3}) {
                Exact out((size_t)(first_only ? lengths.size() : tokens) * hidden * 4);
                std::vector<int32_t> counts(tokens);
                for (int t = 0; decisions.outside && t < tokens; t++) counts[t] = -decisions.outside[t];
                std::vector<float> received((size_t)3 * tokens);
                Request request{};
                request.sequences = (int)lengths.size(), request.cu_seqlens = cu_seqlens.data();
                request.ids = ids.data(), request.positions = positions.data(), request.threads = threads;
                request.thresholds = prune ? thresholds : nullptr, request.prunes = prunes;
                request.first_only = first_only, request.record = true, request.out = (float*)out.data;
                request.survived = counts.data(), request.received = received.data(), request.departed = true;
                request.stays = decisions.stays, request.asks = decisions.asks;
                request.probes = decisions.probes, request.probed = decisions.probed;
                request.context = maps.get(), request.outside = decisions.outside, request.unread = decisions.unread;
                std::vector<uint8_t> hosts(tokens);
                if (summarize) request.segments = segments.data(), request.hosts = hosts.data();
                check(run(*encoder, request), "forward");
                double worst = 0, squares = 0, count = 0;
                bool same = true;
                for (size_t s = 0; s < lengths.size(); s++) {
                    if (!clear[s]) continue;
                    for (int t = cu_seqlens[s]; t < (first_only ? cu_seqlens[s] + 1 : cu_seqlens[s + 1]); t++)
                        for (int d = 0; d < hidden; d++) {
                            const float value = ((float*)out.data)[(first_only ? s : t) * hidden + d];
                            worst = std::max(worst, std::fabs(value - expected[t][d]));
                            squares += expected[t][d] * expected[t][d], count++;
                        }
                    for (int t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) same &= counts[t] == survived[t];
                }
                const std::string name = level.name() + " encoder, threads " + std::to_string(threads) +
                                         (prune ? ", pruned" : "") + (summarize ? " with summaries" : "") +
                                         (decisions.asks ? " by some" : "") + (probe ? " by probes" : "") +
                                         (maps ? ", with context" : "") + (first_only ? ", first tokens" : "");
                if (count) worst /= 3 * std::sqrt(squares / count);
                // What context gives is quantised twice more: states, and codes.
                const double allowed = (maps && level.dtype == Dtype::int8 ? 4 : 2) * level.tolerance();
                check(worst <= allowed, name + ": " + std::to_string(worst));
                if (level.dtype == Dtype::float32) check(same, name + ": other tokens kept");
                std::vector<float> now((float*)out.data,
                                       (float*)out.data + (first_only ? lengths.size() : tokens) * hidden);
                if (threads == 1)
                    once = now;
                else
                    check(once == now, name + ": not what one thread gives");
            }
    }
}

static void check_refusals(const Candidate& level, const Model& model) {
    const auto encoder = model.build(*level.kernels);
    std::vector<int32_t> cu_seqlens{0, 3, 6}, zeros(6), survived(6);
    std::vector<float> out(6 * model.shape.hidden), probes(3 * (model.shape.hidden + 1));
    std::vector<uint8_t> apart{0, 1, 1, 1, 0, 1}, together{0, 1, 1, 1, 1, 0}, hosts(6), probed{0, 1, 0};
    auto refusal = [&](auto change) {
        Request request{};
        request.sequences = 2, request.cu_seqlens = cu_seqlens.data(), request.threads = 1;
        request.ids = request.positions = zeros.data(), request.out = out.data(), request.survived = survived.data();
        change(request);
        try {
            run(*encoder, request);
        } catch (const std::invalid_argument& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    auto expect = [&](const std::string& message, auto change) {
        const std::string found = refusal(change);
        check(found == message, level.name() + " says \"" + found + "\", not \"" + message + "\"");
    };
    expect("", [&](Request& r) { r.asks = together.data(), r.probes = probes.data(), r.probed = probed.data(); });
    expect("the asking tokens of a sequence must be next to each other", [&](Request& r) { r.asks = apart.data(); });
    expect("places must rise within a sequence", [&](Request& r) { r.places = zeros.data(); });
    expect("probes and probed go together", [&](Request& r) { r.probes = probes.data(); });
    expect("probes and probed go together", [&](Request& r) { r.probed = probed.data(); });
    expect("summaries and probes exclude each other",
           [&](Request& r) { r.probes = probes.data(), r.probed = probed.data(), r.hosts = hosts.data(); });
    const Context context(model.shape, 64, {0}), late(model.shape, 64, {1, 2});
    const auto maps = context.build(*encoder), others = late.build(*encoder);
    const ContextMaps fewer(maps->kernels, model.shape.layers - 1, 64);
    std::vector<uint8_t> outside{0, 1, 0, 0, 0, 1}, first{0, 0, 0, 1, 0, 0}, two{0, 2, 0, 0, 0, 0};
    auto mark = [&](const Request& r, const std::vector<uint8_t>& tokens) {
        for (size_t i = 0; i < tokens.size(); i++) r.survived[i] = -tokens[i];
        return tokens.data();
    };
    expect("", [&](Request& r) { r.context = maps.get(), r.outside = mark(r, outside); });
    expect("", [&](Request& r) { r.context = others.get(); });
    expect("context of another encoder", [&](Request& r) { r.context = &fewer; });
    expect("summaries and context exclude each other",
           [&](Request& r) { r.context = maps.get(), r.hosts = hosts.data(); });
    expect("tokens outside are context", [&](Request& r) { r.outside = mark(r, outside); });
    expect("tokens outside are context", [&](Request& r) { r.context = others.get(), r.outside = mark(r, outside); });
    expect("no sequence's first token can be outside",
           [&](Request& r) { r.context = maps.get(), r.outside = mark(r, first); });
    expect("outside must be 0 or 1, as survived says",
           [&](Request& r) { r.context = maps.get(), r.outside = mark(r, two); });
    expect("outside must be 0 or 1, as survived says",
           [&](Request& r) { mark(r, outside), r.context = maps.get(), r.outside = two.data(); });
}

static void check_many_callers(const Candidate& level, const Model& model) {
    const auto encoder = model.build(*level.kernels);
    std::atomic<int> wrong{0};
    auto call = [&](int length, std::vector<float>& out) {
        std::vector<int32_t> ids(length, 3), positions(length), counts(length), cu_seqlens{0, length};
        for (int i = 0; i < length; i++) positions[i] = i, ids[i] = i % 40;
        out.resize(model.shape.hidden);
        Request request{};
        request.sequences = 1, request.cu_seqlens = cu_seqlens.data(), request.ids = ids.data();
        request.positions = positions.data(), request.threads = 2, request.first_only = true, request.out = out.data();
        request.survived = counts.data();
        run(*encoder, request);
    };
    std::vector<float> expected[4];
    for (int i = 0; i < 4; i++) call(10 * i + 1, expected[i]);
    std::vector<std::thread> callers;
    for (int c = 0; c < 6; c++)
        callers.emplace_back([&, c] {
            std::vector<float> out;
            for (int i = 0; i < 12; i++) {
                call(10 * ((c + i) % 4) + 1, out);
                wrong += out != expected[(c + i) % 4];
            }
        });
    for (std::thread& caller : callers) caller.join();
    check(wrong == 0, level.name() + " called from six threads");
}

// How many states were compared with the reference, and how often the memory ran out.
static long compared = 0, refusals = 0;

// One forward pass of a random encoder: shapes, batch, decisions, dtype and level. Everything must be within its
// memory; states are compared unless a decision by thresholds could go either way; a NaN stays in its sequence.
static long skipped = 0;  // sizes that the level's kernels do not have

static void random_case(const std::vector<Candidate>& all, const std::string& name) {
    auto pick = [](int low, int high) { return low + (int)(generator() % (unsigned)(high - low + 1)); };
    auto one_in = [&](int n) { return pick(1, n) == 1; };
    const Candidate& level = all[generator() % all.size()];
    const int head_sizes[] = {1, 3, 8, 16, 20, 32};
    const int head = one_in(200) ? pick(257, 300) : head_sizes[pick(0, 5)], heads = pick(1, 3);
    const int copies = head * heads < 8 ? 8 : 1;  // so that LayerNorm has something to go by
    const int layers = pick(1, 3), inner = pick(1, 96);
    const Shape basic = post_norm(layers, head * heads * copies, heads * copies, inner, (Activation)pick(0, 3));
    const int size = one_in(2) ? basic.hidden : pick(8, 64);
    Model model = one_in(3) ? Model(basic, size) : Model::any(basic, size, pick);
    const bool with_context = one_in(2);
    const Shape& shape = model.shape;
    if (!level.kernels->fits(shape.hidden, shape.inner, shape.head_size) ||
        !level.kernels->fits(shape.query_size(), shape.inner, shape.head_size) ||
        !level.kernels->fits(model.size, model.size, 32)) {
        skipped++;
        return;
    }
    const auto encoder = model.build(*level.kernels);
    std::vector<int32_t> ids, positions, types, places, cu_seqlens(1, 0);
    std::vector<uint8_t> segments;
    const int longest = one_in(50) ? 250 : one_in(5) ? 60 : 16;
    // Many short ones share a chunk, and their context can be more than it holds.
    for (int s = longest > 60 ? 1 : longest == 16 && one_in(10) ? 30 : pick(1, 5); s > 0; s--) {
        const int length = pick(1, longest);
        for (int i = 0; i < length; i++)
            ids.push_back(pick(0, model.words - 2)), positions.push_back(i), types.push_back(0),
                places.push_back(Model::place(i)), segments.push_back(i >= length / 2);
        cu_seqlens.push_back((int)ids.size());
    }
    const int tokens = (int)ids.size(), sequences = (int)cu_seqlens.size() - 1, hidden = shape.hidden;
    const int method = pick(0, 2);  // nothing, thresholds, the caller
    const bool first_only = one_in(2), record = one_in(2), by_segment = one_in(2), departed = one_in(2);
    const bool probe = method && one_in(3), summarize = method && !probe && !with_context && one_in(2);
    std::vector<float> thresholds(shape.layers), probes;
    std::vector<uint8_t> prunes(shape.layers), probed(shape.layers), stays(tokens), asks(tokens);
    for (int l = 0; l < shape.layers; l++) {
        thresholds[l] = (float)pick(0, 150) / 100 / (method == 1 && one_in(2) ? 1.0f : 8.0f), prunes[l] = !one_in(4);
        probed[l] = one_in(2);
        if (probed[l] && probe) thresholds[l] = (float)pick(-100, 50) / 100;
    }
    if (probe) probes = random_numbers((size_t)shape.layers * (hidden + 1), 1 / std::sqrt((float)hidden));
    for (uint8_t& token : stays) token = one_in(4);
    for (int s = 0; s < sequences; s++) {  // those who ask are next to each other, and may be none
        const int begin = pick(cu_seqlens[s], cu_seqlens[s + 1]), end = pick(begin, cu_seqlens[s + 1]);
        std::fill(asks.begin() + begin, asks.begin() + end, 1);
    }
    std::vector<uint8_t> effective = prunes;  // decisions in a last layer of which only first tokens are wanted
    if (first_only && !record) effective.back() = 0;
    Decisions decisions;
    decisions.thresholds = method == 1 ? thresholds.data() : nullptr, decisions.prunes = effective.data();
    decisions.divisor = one_in(2) ? 0.0f : 8.0f, decisions.caller = method == 2;
    decisions.summarize = summarize, decisions.by_segment = by_segment;
    if (one_in(3)) decisions.stays = stays.data();
    if (one_in(2)) decisions.asks = asks.data();
    if (probe) decisions.probes = probes.data(), decisions.probed = probed.data();
    decisions.unread = one_in(3);
    std::vector<int32_t> downs(1, pick(0, shape.layers));  // some may be missing
    for (int l = 0; l <= shape.layers; l++)
        if (l != downs[0] && !one_in(3)) downs.push_back(l);
    std::sort(downs.begin(), downs.end());
    const Context context(shape, one_in(2) ? 64 : one_in(4) ? pick(65, 130) : pick(1, 63), downs);
    std::vector<uint8_t> outside(tokens);
    const int out_of = pick(1, 4);  // 1: nothing but first tokens enters
    for (int s = 0; s < sequences; s++)
        for (int t = cu_seqlens[s] + 1; t < cu_seqlens[s + 1]; t++) outside[t] = one_in(out_of);
    std::unique_ptr<ContextMaps, void (*)(ContextMaps*)> maps(nullptr, tp_context_free);
    if (with_context) {
        decisions.context = &context, maps = context.build(*encoder);
        check(maps != nullptr, name + " context: " + tp_last_error());
        if (context.has(0) && !one_in(4)) decisions.outside = outside.data();
    }
    auto is_outside = [&](int token) { return decisions.outside && decisions.outside[token]; };
    // What is compared in the end, with every buffer of exactly its size.
    struct Result {
        std::vector<float> out, received;
        std::vector<int32_t> survived;
    };
    auto bits_of = [](const Result& r, size_t from, size_t rows) {
        return std::string((const char*)(r.out.data() + from), rows * sizeof(float));
    };
    auto forward = [&](const Encoder& encoder, int threads, int first, int sequences) {
        std::vector<int32_t> offsets(cu_seqlens.begin() + first, cu_seqlens.begin() + first + sequences + 1);
        const int begin = offsets[0], tokens = offsets.back() - begin;
        for (int32_t& offset : offsets) offset -= begin;
        const size_t rows = first_only ? sequences : tokens;
        const Decisions by = decisions.from(begin);
        Exact out(rows * hidden * 4), received((size_t)shape.layers * tokens * 4), importance(tokens * 4), keep(tokens);
        std::vector<int32_t> survived(tokens);
        std::vector<uint8_t> hosts(tokens);
        auto start = [&] {
            for (int t = 0; t < tokens; t++) survived[t] = -is_outside(begin + t), hosts[t] = 0;
        };
        start();
        Request request{};
        request.sequences = sequences, request.cu_seqlens = offsets.data();
        request.ids = ids.data() + begin, request.positions = positions.data() + begin, request.threads = threads;
        request.places = places.data() + begin;
        request.types = one_in(2) ? types.data() + begin : nullptr, request.thresholds = by.thresholds;
        request.prunes = prunes.data(), request.divisor = by.divisor;
        request.stays = by.stays, request.asks = by.asks, request.probes = by.probes, request.probed = by.probed;
        request.first_only = first_only, request.record = record, request.departed = departed;
        request.context = maps.get(), request.outside = by.outside, request.unread = by.unread;
        request.out = (float*)out.data;
        request.survived = survived.data(), request.received = one_in(2) ? (float*)received.data : nullptr;
        if (method == 2) request.importance = (float*)importance.data, request.keep = (uint8_t*)keep.data;
        if (summarize) request.hosts = hosts.data(), request.segments = by_segment ? segments.data() + begin : nullptr;
        if (method == 2 && one_in(10)) {  // given up half-way; then all over again
            run(encoder, request, pick(0, 1));
            start();
        }
        check(run(encoder, request), name + " forward");
        const float *states = (float*)out.data, *decided = request.received;
        Result result{{states, states + rows * hidden}, {}, survived};
        if (decided) result.received.assign(decided, decided + (size_t)shape.layers * tokens);
        return result;
    };
    const int threads = pick(1, 3);
    const Result found = forward(*encoder, threads, 0, sequences);
    const std::string what =
        name + " " + level.name() + ", hidden " + std::to_string(hidden) + ", inner " + std::to_string(shape.inner) +
        (shape.norm_first ? ", norm first" : "") + (shape.rms_norm ? ", RMS" : "") + (shape.gated ? ", gated" : "") +
        (model.bias.empty() ? "" : ", bias") + (model.columns.empty() ? "" : ", disentangled") + ", tokens " +
        std::to_string(tokens) + ", method " + std::to_string(method) + (summarize ? " with summaries" : "") +
        (probe ? " with probes" : "") + (decisions.stays ? ", some stay" : "") + (decisions.asks ? ", some ask" : "") +
        (maps ? ", context of rank " + std::to_string(context.rank) : "") + (decisions.outside ? ", some outside" : "");
    if (one_in(maps ? 2 : 4)) {  // the same to the last bit with more threads, and of a sequence alone
        const Result again = forward(*encoder, threads % 3 + 1, 0, sequences);
        check(bits_of(again, 0, again.out.size()) == bits_of(found, 0, found.out.size()) &&
                  again.survived == found.survived,
              what + ": not what so many threads give");
        const int s = pick(0, sequences - 1);
        const Result alone = forward(*encoder, pick(1, 3), s, 1);
        check(bits_of(alone, 0, alone.out.size()) ==
                      bits_of(found, (size_t)(first_only ? s : cu_seqlens[s]) * hidden, alone.out.size()) &&
                  std::equal(alone.survived.begin(), alone.survived.end(), found.survived.begin() + cu_seqlens[s]),
              what + ": not what a sequence gives alone");
    }
    // Rows of tokens that left are written where they are wanted, and only there.
    auto wanted = [&](int token) { return first_only || departed || found.survived[token] == shape.layers; };
    const std::string untouched(hidden * sizeof(float), '\xFF');
    for (int t = 0; t < tokens; t++)
        if (!wanted(t)) check(bits_of(found, (size_t)t * hidden, hidden) == untouched, what + ": an unused row");
    for (int t = 0; t < tokens; t++)
        check((found.survived[t] == -1) == is_outside(t) && found.survived[t] >= -1, what + ": who is outside");
    for (int s = 0; s < sequences; s++) {
        std::vector<Model::Row> states, decided;
        std::vector<int> counts;
        const std::vector<int32_t> text(ids.begin() + cu_seqlens[s], ids.begin() + cu_seqlens[s + 1]);
        const double margin = model.reference(text, decisions.from(cu_seqlens[s]), states, counts, decided);
        const bool sure = method != 1 || margin >= (level.dtype == Dtype::float32 ? 1e-4 : 1e9);
        auto known = [&](int token) { return wanted(token) && (sure || (is_outside(token) && !first_only)); };
        double count = 0;
        auto farthest = [&](auto&& value_of) {  // from the reference, in units of its values
            double worst = 0, squares = 0;
            count = 0;
            for (int t = cu_seqlens[s]; t < (first_only ? cu_seqlens[s] + 1 : cu_seqlens[s + 1]); t++)
                for (int d = 0; known(t) && d < hidden; d++) {
                    const double expected = states[t - cu_seqlens[s]][d];
                    const double difference = std::fabs(value_of(t, d) - expected);
                    worst = difference <= worst ? worst : difference;  // NaN is worse than all
                    squares += expected * expected, count++;
                }
            return count ? worst / (1 + 3 * std::sqrt(squares / count)) : 0.0;
        };
        const double worst =
            farthest([&](int t, int d) { return found.out[(size_t)(first_only ? s : t) * hidden + d]; });
        compared += (long)count;
        double allowed = level.dtype == Dtype::float32 ? 1e-3 : level.dtype == Dtype::bfloat16 ? 0.15 : 1.5;
        if (worst > allowed && level.dtype != Dtype::float32) {  // a few random encoders multiply what rounding does
            Model nudged = model;
            for (size_t i = 0; i < nudged.word.size(); i++) nudged.word[i] *= i % 3 == 1 ? 1 + 0x1p-8f : 1 - 0x1p-8f;
            std::vector<Model::Row> moved, other;
            std::vector<int> as_many;
            nudged.reference(text, decisions.from(cu_seqlens[s]), moved, as_many, other);
            allowed += 4 * farthest([&](int t, int d) { return moved[t - cu_seqlens[s]][d]; });
        }
        check(worst <= allowed, what + ": " + std::to_string(worst) + " of " + std::to_string(allowed));
        if (!sure) continue;
        for (int t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++)
            check(found.survived[t] == counts[t - cu_seqlens[s]], what + ": other tokens kept");
        for (int l = 0; l < shape.layers && !found.received.empty() && level.dtype == Dtype::float32; l++)
            for (int t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) {
                const double expected = decided[l][t - cu_seqlens[s]], actual = found.received[(size_t)l * tokens + t];
                check(std::isnan(expected) ? std::isnan(actual)
                                           : std::fabs(actual - expected) <= 1e-3 * (1 + std::fabs(expected)),
                      what + ": decided by " + std::to_string(actual) + " for " + std::to_string(expected));
            }
    }
    if (!one_in(8)) return;
    // A word that is NaN, in one sequence: that one is NaN, the others are the same to the last bit.
    Model broken = model;
    for (int i = 0; i < model.size; i++) broken.word[(size_t)(model.words - 1) * model.size + i] = std::nanf("");
    const int victim = pick(0, sequences - 1);
    bool windowed = false;  // then a row depends on those that it sees alone
    for (const Step& step : model.steps) windowed |= step.window >= 0;
    const int spoilt = pick(cu_seqlens[victim], cu_seqlens[victim + 1] - 1);
    ids[spoilt] = model.words - 1;
    const Result poisoned = forward(*broken.build(*level.kernels), pick(1, 3), 0, sequences);
    for (int s = 0; s < sequences; s++) {
        const size_t from = (size_t)(first_only ? s : cu_seqlens[s]) * hidden;
        const size_t to = (size_t)(first_only ? s + 1 : cu_seqlens[s + 1]) * hidden;
        bool good = s == victim || bits_of(poisoned, from, to - from) == bits_of(found, from, to - from);
        for (size_t i = from; s == victim && !windowed && i < to; i++) {
            const int token = (int)(i / hidden);  // one that is outside sees nobody
            good &= !first_only && is_outside(token) && token != spoilt ? same_bits(&poisoned.out[i], &found.out[i], 1)
                                                                        : std::isnan(poisoned.out[i]);
        }
        check(good, what + ": a NaN was lost, or went to another sequence");
    }
}

// Everything through the C interface. False as soon as something fails, which must be for want of memory alone.
static bool use_interface(const Candidate& level, const Model& model) {
    const Shape& shape = model.shape;
    std::unique_ptr<Encoder, void (*)(Encoder*)> encoder(tp_encoder_new(level.level, (int)level.dtype, &shape),
                                                         tp_encoder_free);
    if (!encoder) return false;
    Encoder* e = encoder.get();
    auto table = [&](int which, const std::vector<float>& values, int rows) {
        return tp_encoder_set_table(e, which, values.data(), rows, model.size, 0) == 0;
    };
    if (!table(0, model.word, model.words) || !table(1, model.position, model.positions)) return false;
    if (tp_encoder_set_norm(e, -1, 0, model.inner_gamma.data(), model.inner_beta.data(), model.size)) return false;
    for (int i = 0; i < (int)model.sizes.size(); i++)
        if (tp_encoder_set_linear(e, i ? (i - 1) / 6 : -1, i ? (i - 1) % 6 : 0, model.weights[i].data(),
                                  model.biases[i].data(), nullptr, model.sizes[i].first, model.sizes[i].second))
            return false;
    for (int i = 0; i < 2 * shape.layers; i++)
        if (tp_encoder_set_norm(e, i / 2, i % 2, model.gamma.data(), model.beta.data(), shape.hidden)) return false;
    static int32_t cu_seqlens[] = {0, 2}, ids[] = {1, 2}, positions[] = {0, 1};
    static int32_t survived[2];
    static float out[2 * 64];
    alignas(64) static char workspace[1 << 22];
    Request request{};
    request.sequences = 1, request.tokens = 2, request.layers = shape.layers, request.threads = 2;
    request.cu_seqlens = cu_seqlens, request.ids = ids, request.positions = positions;
    request.out = out, request.survived = survived, request.workspace = workspace;
    request.workspace_bytes = sizeof workspace;
    if (tp_encoder_workspace_bytes(e, &request) < 0 || tp_encoder_forward(e, &request)) return false;
    static int32_t entered[] = {0, 1};
    static uint8_t outside[] = {0, 1};
    static float numbers[3 * 128 * 64];
    std::unique_ptr<ContextMaps, void (*)(ContextMaps*)> maps(
        tp_context_new(e, entered, 2, 40, numbers, numbers, numbers, numbers), tp_context_free);
    if (!maps) return false;
    request.context = maps.get(), request.outside = outside, survived[0] = 0, survived[1] = -1;
    if (tp_encoder_workspace_bytes(e, &request) < 0 || tp_encoder_forward(e, &request)) return false;
    std::unique_ptr<Head, void (*)(Head*)> head(
        tp_linear_new(PORTABLE, 0, model.weights[1].data(), nullptr, nullptr, shape.hidden, shape.hidden),
        tp_linear_free);
    static float x[4 * 64], y[4 * 64];
    return head && tp_linear_apply(head.get(), x, 4, y, 2) == 0;
}

static void check_memory_runs_out(const Candidate& level, const Model& model) {
    for (long n = 0;; n++) {
        allocation_failed.store(false), allocations_left.store(n);
        const bool done = use_interface(level, model);
        allocations_left.store(-1);
        if (!allocation_failed.load()) {
            check(done, level.name() + " through the C interface: " + tp_last_error());
            return;
        }
        refusals++;
        check(!done && std::string(tp_last_error()) == "out of memory",
              level.name() + " without memory: " + tp_last_error());
    }
}

// What was packed comes out again, and packs to the same bytes.
static void check_unpacking(const Candidate& level, int in, int out) {
    const Kernels& k = *level.kernels;
    if (!k.holds(in, out)) return;
    auto w = random_numbers((size_t)out * in), b = random_numbers(out);
    std::fill_n(w.begin(), in, 0.0f);
    if (out > 2) w[in] = std::nanf(""), w[2 * in] = 1e-40f;
    const size_t bytes = k.weight_bytes(in, out);
    Exact memory(bytes), again(bytes);
    Slabs slabs(0);
    const Linear first = pack_linear(k, slabs, w.data(), b.data(), nullptr, in, out);
    std::vector<float> weight((size_t)out * in), bias(out), scale(out);
    unpack_linear(k, first, weight.data(), bias.data(), scale.data());
    const Linear second = pack_linear(k, slabs, weight.data(), bias.data(), scale.data(), in, out);
    const std::string name = level.name() + " unpacked " + std::to_string(in) + "×" + std::to_string(out);
    check(std::memcmp(first.weight, second.weight, bytes) == 0 && bias == b, name);
    if (level.dtype == Dtype::int8)
        check(std::memcmp(first.scale, second.scale, out * 4) == 0, name + ": scales");
    else
        for (size_t i = 0; i < w.size(); i++)
            check(std::isnan(w[i]) ? std::isnan(weight[i])
                                   : weight[i] == (level.dtype == Dtype::float32 ? w[i] : from_half(half(w[i]))),
                  name + ": numbers");
}

static void check_team() {
    std::atomic<int> ran{0};
    auto begin = [&](int, int) { ran = 0; };
    auto throws = [&](int rank, int threads) {
        ran++;
        if (rank == threads - 1) throw std::runtime_error("of a worker");
    };
    std::string caught;
    try {
        run_on_team(2, begin, throws);
    } catch (const std::runtime_error& error) {
        caught = error.what();
    }
    check(caught == "of a worker", "what a thread throws reaches the caller");
    auto works = [&](int, int) { ran++; };
    run_on_team(1000, begin, works);
    check(ran >= 1 && ran <= usable_cores(), "a team takes no more than the cores there are");
}

int main(int count, char** arguments) {
    bool quick = false, shapes = false;
    long cases = 0;
    unsigned seed = 7;
    std::string only;
    for (int i = 1; i < count; i++) {
        const std::string name = arguments[i];
        if (name == "--quick")
            quick = true;
        else if (name == "--shapes")
            shapes = true;
        else if (name == "--cases" && i + 1 < count)
            cases = std::atol(arguments[++i]);
        else if (name == "--seed" && i + 1 < count)
            seed = (unsigned)std::atol(arguments[++i]);
        else if (name == "--level" && i + 1 < count)
            only = arguments[++i];
        else
            return std::fprintf(stderr, "check [--quick | --shapes | --cases N [--seed S] [--level NAME]], not %s\n",
                                arguments[i]),
                   2;
    }
    std::vector<Candidate> all;
    for (const Candidate& level : levels())
        if (only.empty() || only == level.kernels->level) all.push_back(level);
    if (all.empty()) return std::fprintf(stderr, "this processor has no level %s\n", only.c_str()), 2;
    std::string names;  // float32, bfloat16, int8; a level may have some of them
    for (const Candidate& level : all) names += (names.empty() ? "" : ", ") + level.name();
    if (cases) {
        for (long i = 0; i < cases; i++) {
            generator.seed(seed * 1000003u + (unsigned)i);
            random_case(all, "case " + std::to_string(i));
        }
        std::printf("%s: %ld cases, seed %u, %ld numbers compared, %d checks, %d failures\n", names.c_str(),
                    cases - skipped, seed, compared, checks, failures);
        return failures != 0;
    }
    const Model model;
    check_team();
    for (const Candidate& level : all) {
        if (!quick) check_shapes(level);
        if (shapes) continue;
        if (!quick) {
            for (int in : {1, 7, 50, 64, 192})
                for (int out : {1, 32, 33, 64}) check_unpacking(level, in, out);
            for (int size = 1; size <= 65; size++) {  // every tail of every dimension
                const Pattern pattern = (Pattern)(size % PATTERNS);
                check_exact(level, size, 64, 32, pattern), check_exact(level, size, 37, 33, RANDOM);
                check_exact(level, 13, size, 19, pattern), check_exact(level, 5, size, 32, RANDOM);
                check_exact(level, 7, 30, size, pattern), check_exact(level, 14, 66, size, RANDOM);
            }
            for (int in : {191, 192, 384, 765, 767, 768, 769, 771, 772, 1024})
                for (Pattern pattern : {SAME, OPPOSITE, ALTERNATING, RANDOM}) check_exact(level, 25, in, 64, pattern);
            for (int rows : {1, 2, 15, 16, 17, 31, 32, 33, 50, 64, 65})
                for (int in : {64, 192}) check_product(level, rows, in, 64);
            for (int rows : {1, 33, 70}) check_product(level, rows, 1600, 96), check_product(level, rows, 300, 33);
            for (int in : {1, 7, 50, 255, 256, 257}) check_product(level, 13, in, in == 7 ? 1 : 40);
            for (int keys : {1, 2, 15, 16, 17, 31, 32, 33, 63, 100, 257, 512})
                for (int head_size : {32, 64, 96, 128, 8, 20, 300})
                    check_attention(level, keys, keys > 200 ? 40 : keys, head_size);
            check_attention(level, 50, 1, 64);
            for (int keys : {1, 2, 16, 31, 33, 70, 257})
                for (bool apart : {false, true})
                    for (int head_size : {20, 32, 128}) {
                        check_attention(level, keys, keys, head_size, {true, apart});
                        check_attention(level, keys, (keys + 2) / 3, head_size, {true, apart, -1, 300});
                        for (int window : {0, 1, 8, 40})
                            check_attention(level, keys, (keys + 1) / 2, head_size, {false, apart, window});
                        check_attention(level, keys, keys, head_size, {true, apart, 12});
                        for (int far : {0, 9, 300})
                            for (int by : {1, 2, 3})
                                check_attention(level, keys, (keys + 1) / 2, head_size,
                                                {false, apart, -1, far, by != 2, by != 1});
                        check_attention(level, keys, keys, head_size, {true, apart, 12, 40, true, true});
                    }
        }
        if (level.kernels->fits(model.shape.hidden, model.shape.inner, 32) &&
            level.kernels->fits(model.size, model.size, 32)) {
            check_encoder(level, model,
                          quick ? std::vector<int>{5, 70} : std::vector<int>{1, 2, 15, 16, 17, 31, 32, 33});
            if (!quick) check_encoder(level, model, {40}), check_encoder(level, model, {300, 260, 90});
            if (!quick) check_encoder(level, model, std::vector<int>(20, 15));
            check_refusals(level, model);
            check_many_callers(level, model);
            check_memory_runs_out(level, model);
        } else if (level.kernels->half) {  // the embeddings' width of 32 is no multiple of 64
            generator.seed(0);             // how far int8 is from the reference depends on the weights
            const Model wide(model.shape, 128);
            check_encoder(level, wide, {1, 17, 33, 64});
            check_many_callers(level, wide);
        }
    }
    std::printf("%s: %d checks, %ld times without memory, %d failures\n", names.c_str(), checks, refusals, failures);
    return failures != 0;
}
