// Every kernel level against plain loops in double precision, on buffers of exactly the size they are said to have.
// `make sanitize` builds it with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../src/token_pruning/native/cpu_level.h"
#include "../../src/token_pruning/native/encoder.h"
#include "../../src/token_pruning/native/threads.h"

using namespace tp;

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
        std::memset(data, 0xA5, bytes);  // not zero: what is read must have been written
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
    std::string name() const {
        const char* names[] = {"float32", "bfloat16", "int8"};
        return std::string(kernels->level) + " " + names[(int)dtype];
    }
    double tolerance() const { return dtype == Dtype::float32 ? 1e-4 : dtype == Dtype::bfloat16 ? 2e-2 : 4e-2; }
};

static std::vector<Candidate> levels() {
    std::vector<Candidate> all;
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8}) {
        all.push_back({portable_kernels(dtype), dtype});
#if defined(TP_X86)
        if (best_level() >= AVX2) all.push_back({avx2_kernels(dtype), dtype});
        if (best_level() >= AVX512) all.push_back({avx512_kernels(dtype), dtype});
        if (best_level() >= AMX && amx_kernels(dtype)) all.push_back({amx_kernels(dtype), dtype});
#endif
    }
    return all;
}

static double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

static void check_product(const Candidate& level, int rows, int in, int out) {
    const Kernels& k = *level.kernels;
    if (!k.fits(in, in, 32) || (k.half && out % 32)) return;
    const std::string name =
        level.name() + " " + std::to_string(rows) + "×" + std::to_string(in) + "×" + std::to_string(out);
    const auto x = random_numbers((size_t)rows * in), w = random_numbers((size_t)out * in, 0.1f),
               b = random_numbers(out), other = random_numbers((size_t)(rows + 3) * out);
    Slabs slabs(0);
    const Linear linear = pack_linear(k, slabs, w.data(), b.data(), in, out);
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
        if (k.half && out % 32) return;
        std::vector<float> identity((size_t)out * out), zero(out);
        for (int i = 0; i < out; i++) identity[(size_t)i * out + i] = 1;
        const Linear next = pack_linear(k, slabs, identity.data(), nullptr, out, out);
        Exact inner(k.packed_rows_bytes(rows, out)), more(k.product_scratch(rows, out, out));
        run(Epilogue::activate_pack, inner.data, 2);
        k.multiply({&next, inner.data, nullptr, rows, 0, panels(k, next), Epilogue::store_float, Activation::gelu,
                    floats.data, (size_t)out, nullptr, nullptr, more.data});
        compare("activate_pack", [&](size_t i) { return f[i]; }, [&](size_t i) { return gelu(expected[i]); });
    }
    k.leave();
}

static void check_attention(const Candidate& level, int keys, int queries, int head_size) {
    const Kernels& k = *level.kernels;
    if (!k.fits(64, 64, head_size)) return;
    const std::string name =
        level.name() + " attention of " + std::to_string(keys) + " keys, head size " + std::to_string(head_size);
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
    k.enter();
    k.attend({xq.data, xk.data, xv.data, (size_t)head_size, (size_t)head_size, queries, keys, head_size, scale,
              context.data, (size_t)head_size, (float*)received.data, scratch.data});
    k.leave();
    std::vector<double> sums(keys), expected(q.size());
    for (int i = 0; i < queries; i++) {
        std::vector<double> p(keys);
        double top = -1e300, total = 0;
        for (int j = 0; j < keys; j++) {
            for (int d = 0; d < head_size; d++) p[j] += (double)q[i * head_size + d] * key[j * head_size + d];
            p[j] *= scale, top = std::max(top, p[j]);
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
    const double allowed = k.half ? 3e-2 : 1e-4;
    check(worst <= allowed, name + ": context " + std::to_string(worst));
    check(worst_sum <= allowed, name + ": received " + std::to_string(worst_sum));
}

// A whole encoder with random weights, and the same in double precision one sequence at a time.
struct Model {
    Shape shape{3, 64, 2, 128, 1e-5f, Activation::gelu};
    int words = 50, positions = 520, size = 32;
    std::vector<float> word = random_numbers(words * size), position = random_numbers(positions * size),
                       type = random_numbers(2 * size), gamma = random_numbers(128), beta = random_numbers(128);
    std::vector<std::vector<float>> weights, biases;
    std::vector<std::pair<int, int>> sizes;  // in, out
    Model() {
        auto add = [&](int in, int out) {
            sizes.push_back({in, out});
            weights.push_back(random_numbers((size_t)in * out, 0.15f)), biases.push_back(random_numbers(out, 0.1f));
        };
        add(size, shape.hidden);
        for (int l = 0; l < shape.layers; l++) {
            for (int i = 0; i < 4; i++) add(shape.hidden, shape.hidden);
            add(shape.hidden, shape.inner), add(shape.inner, shape.hidden);
        }
    }

    std::unique_ptr<Encoder> build(const Kernels& k) const {
        auto encoder = std::make_unique<Encoder>(k, shape);
        Slabs& memory = encoder->memory;
        auto linear = [&](int i) {
            return pack_linear(k, memory, weights[i].data(), biases[i].data(), sizes[i].first, sizes[i].second);
        };
        auto table = [&](const std::vector<float>& values) {
            char* place = memory.take(values.size() * 4);
            std::memcpy(place, values.data(), values.size() * 4);
            return place;
        };
        Embeddings& e = encoder->embeddings;
        e.word = table(word), e.position = table(position), e.type = table(type);
        e.size = size, e.words = words, e.positions = positions, e.types = 2;
        e.norm = {{gamma.begin(), gamma.begin() + size}, {beta.begin(), beta.begin() + size}};
        e.projection = linear(0);
        for (int l = 0, i = 1; l < shape.layers; l++) {
            Layer& layer = encoder->layers[l];
            for (Linear* to : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down})
                *to = linear(i++);
            layer.attention_norm = layer.output_norm = {gamma, beta};
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
    Row norm(Row x) const {
        double mean = 0, variance = 0;
        for (double v : x) mean += v / x.size();
        for (double v : x) variance += (v - mean) * (v - mean) / x.size();
        for (size_t i = 0; i < x.size(); i++)
            x[i] = (x[i] - mean) / std::sqrt(variance + shape.epsilon) * gamma[i] + beta[i];
        return x;
    }

    // Every token's last state, the layers it survived, and how near a decision came to going the other way. With
    // `summarize` what is dropped becomes a summary token for each half of the sequence, a row with `alive` -1 or -2.
    double reference(const std::vector<int>& ids, const float* thresholds, bool summarize, std::vector<Row>& out,
                     std::vector<int>& survived) const {
        double weights[2] = {0, 0};
        const int heads = shape.heads, part = shape.hidden / heads;
        double margin = 1;
        std::vector<Row> x;
        std::vector<int> alive;
        for (size_t t = 0; t < ids.size(); t++) {
            Row row(size);
            for (int i = 0; i < size; i++) row[i] = (double)word[ids[t] * size + i] + type[i] + position[t * size + i];
            x.push_back(apply(0, norm(row))), alive.push_back((int)t);
        }
        out.assign(ids.size(), {}), survived.assign(ids.size(), 0);
        for (int l = 0; l < shape.layers; l++) {
            const int base = 1 + 6 * l, n = (int)x.size();
            std::vector<Row> q, k, v, context(n, Row(shape.hidden));
            for (const Row& row : x)
                q.push_back(apply(base, row)), k.push_back(apply(base + 1, row)), v.push_back(apply(base + 2, row));
            Row received(n);
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < n; i++) {
                    Row p(n);
                    double top = -1e300, total = 0;
                    for (int j = 0; j < n; j++) {
                        for (int d = h * part; d < (h + 1) * part; d++)
                            p[j] += q[i][d] * k[j][d] / std::sqrt((double)part);
                        top = std::max(top, p[j]);
                    }
                    for (double& e : p) total += e = std::exp(e - top);
                    for (int j = 0; j < n; j++) {
                        received[j] += p[j] / total / heads;
                        for (int d = h * part; d < (h + 1) * part; d++) context[i][d] += p[j] / total * v[j][d];
                    }
                }
            std::vector<Row> next, merged(2, Row(shape.hidden));
            std::vector<int> left;
            double gathered[2] = {0, 0};
            auto finish = [&](const Row& attended, int token) {
                Row inner = apply(base + 4, attended);
                for (double& e : inner) e = gelu(e);
                Row after = apply(base + 5, inner);
                for (int d = 0; d < shape.hidden; d++) after[d] += attended[d];
                next.push_back(norm(after)), left.push_back(token);
            };
            for (int i = 0; i < n; i++) {
                Row attended = apply(base + 3, context[i]);
                for (int d = 0; d < shape.hidden; d++) attended[d] += x[i][d];
                attended = norm(attended);
                const bool summary = alive[i] < 0;
                const double distance = received[i] / n - (thresholds ? thresholds[l] : 0);
                if (i && !summary) margin = std::min(margin, std::fabs(distance));
                const bool dropped = i && !summary && distance < 0;
                if (dropped) out[alive[i]] = attended;
                if (summarize && (summary || dropped)) {
                    const int which = summary ? -1 - alive[i] : alive[i] >= (int)ids.size() / 2;
                    const double weight = summary ? weights[which] : received[i];
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
            if (alive[i] >= 0) out[alive[i]] = x[i];
        return margin;
    }
};

static void check_encoder(const Candidate& level, const Model& model, const std::vector<int>& lengths) {
    const auto encoder = model.build(*level.kernels);
    const int hidden = model.shape.hidden;
    std::vector<int32_t> ids, positions, cu_seqlens(1, 0);
    for (int length : lengths) {
        for (int i = 0; i < length; i++) ids.push_back((int)(generator() % model.words)), positions.push_back(i);
        cu_seqlens.push_back((int)ids.size());
    }
    const int tokens = (int)ids.size();
    const float thresholds[] = {0.0f, 0.0098f, 0.0123f};
    for (int method : {0, 1, 2}) {  // nothing dropped, dropped, dropped into summaries
        const bool prune = method > 0, summarize = method == 2;
        std::vector<Model::Row> expected;
        std::vector<int> survived;
        std::vector<bool> clear;  // no decision near its threshold
        for (size_t s = 0; s < lengths.size(); s++) {
            std::vector<Model::Row> states;
            std::vector<int> counts;
            const double margin = model.reference({ids.begin() + cu_seqlens[s], ids.begin() + cu_seqlens[s + 1]},
                                                  prune ? thresholds : nullptr, summarize, states, counts);
            expected.insert(expected.end(), states.begin(), states.end());
            survived.insert(survived.end(), counts.begin(), counts.end());
            clear.push_back(!prune || margin > (level.dtype == Dtype::float32 ? 1e-6 : 1e-3));
        }
        const uint8_t prunes[] = {0, 1, 1};
        std::vector<uint8_t> segments(tokens);
        for (size_t s = 0; s < lengths.size(); s++)
            for (int t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) segments[t] = t - cu_seqlens[s] >= lengths[s] / 2;
        std::vector<float> once;
        for (bool first_only : {false, true})
            for (int threads : {1, 2, 3}) {
                Exact out((size_t)(first_only ? lengths.size() : tokens) * hidden * 4);
                std::vector<int32_t> counts(tokens);
                std::vector<float> received((size_t)3 * tokens);
                Request request{};
                request.sequences = (int)lengths.size(), request.cu_seqlens = cu_seqlens.data();
                request.ids = ids.data(), request.positions = positions.data(), request.threads = threads;
                request.thresholds = prune ? thresholds : nullptr, request.prunes = prunes;
                request.first_only = first_only, request.record = true, request.out = (float*)out.data;
                request.survived = counts.data(), request.received = received.data();
                std::vector<uint8_t> hosts(tokens);
                if (summarize) request.segments = segments.data(), request.hosts = hosts.data();
                check(encoder->forward(request) == 0, "forward");
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
                                         (first_only ? ", first tokens" : "");
                if (count) worst /= 3 * std::sqrt(squares / count);
                check(worst <= 2 * level.tolerance(), name + ": " + std::to_string(worst));
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
        encoder->forward(request);
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

int main(int count, char** arguments) {
    const bool quick = count > 1 && std::string(arguments[1]) == "--quick";
    const Model model;
    for (const Candidate& level : levels()) {
        if (!quick) {
            for (int rows : {1, 2, 15, 16, 17, 31, 32, 33, 50, 64, 65})
                for (int in : {64, 192}) check_product(level, rows, in, 64);
            for (int rows : {1, 33, 70}) check_product(level, rows, 1600, 96), check_product(level, rows, 300, 33);
            for (int in : {1, 7, 50, 255, 256, 257}) check_product(level, 13, in, in == 7 ? 1 : 40);
            for (int keys : {1, 2, 15, 16, 17, 31, 32, 33, 63, 100, 257, 512})
                for (int head_size : {32, 64, 96, 128, 8, 20})
                    check_attention(level, keys, keys > 200 ? 40 : keys, head_size);
            check_attention(level, 50, 1, 64);
        }
        if (level.kernels->fits(model.shape.hidden, model.shape.inner, 32) &&
            level.kernels->fits(model.size, model.size, 32)) {
            check_encoder(level, model,
                          quick ? std::vector<int>{5, 70} : std::vector<int>{1, 2, 15, 16, 17, 31, 32, 33});
            if (!quick) check_encoder(level, model, {40}), check_encoder(level, model, {300, 260, 90});
            check_many_callers(level, model);
        } else if (level.kernels->half) {  // the embeddings' width of 32 is no multiple of 64
            Model wide;
            wide.size = 128;
            wide.word = random_numbers(wide.words * 128), wide.position = random_numbers(wide.positions * 128);
            wide.type = random_numbers(256), wide.weights[0] = random_numbers(128 * 64, 0.1f),
            wide.sizes[0] = {128, 64};
            check_encoder(level, wide, {1, 17, 33, 64});
            check_many_callers(level, wide);
        }
    }
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
