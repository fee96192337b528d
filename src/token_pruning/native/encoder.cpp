#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace tp {

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static size_t page_for(size_t bytes) { return bytes >= (1u << 20) ? 2u << 20 : 64; }

Buffer::Buffer(size_t bytes) {
    // Huge pages: without them reading the weights waits for address translation as much as for memory.
    const size_t page = page_for(bytes);
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    bytes_ = round_up(std::max<size_t>(bytes, 1), page);
    data_ = (char*)::operator new(bytes_, std::align_val_t(page));
#if defined(__linux__)
    if (page > 64) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}
Buffer::~Buffer() {
    if (data_) ::operator delete(data_, std::align_val_t(page_for(bytes_)));
}

char* Slabs::take(size_t bytes) {
    bytes = round_up(bytes, 64);
    if (bytes > left_) {
        slabs_.emplace_back(std::max(bytes, slab_bytes_));
        left_ = slabs_.back().bytes();
    }
    char* place = slabs_.back().data() + slabs_.back().bytes() - left_;
    left_ -= bytes, used_ += bytes;
    return place;
}

Linear pack_linear(const Kernels& kernels, Slabs& slabs, const float* weight, const float* bias, const float* scale,
                   int in, int out) {
    void* packed = slabs.take(kernels.weight_bytes(in, out));
    const size_t padded = round_up(out, 64);  // kernels read whole panels
    float* biases = (float*)slabs.take(padded * sizeof(float));
    float* scales = kernels.quantized ? (float*)slabs.take(padded * sizeof(float)) : nullptr;
    for (size_t i = 0; i < padded; i++) {
        biases[i] = bias && (int)i < out ? bias[i] : 0.0f;
        if (scales) scales[i] = 0.0f;
    }
    kernels.pack_weight(weight, scale, in, out, packed, scales);
    return {in, out, packed, biases, scales};
}

void unpack_linear(const Kernels& kernels, const Linear& linear, float* weight, float* bias, float* scale) {
    kernels.unpack_weight(linear.weight, linear.in, linear.out, weight);
    std::copy_n(linear.bias, linear.out, bias);
    if (linear.scale) std::copy_n(linear.scale, linear.out, scale);
}

namespace {

// A list in memory that somebody else owns.
template <class T>
class List {
public:
    List() = default;
    List(T* data, size_t capacity) : data_(data), capacity_(capacity) {}
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    const T& back() const { return data_[size_ - 1]; }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }
    void clear() { size_ = 0; }
    void push_back(T value) {
        assert(size_ < capacity_);
        data_[size_++] = value;
    }

private:
    T* data_ = nullptr;
    size_t capacity_ = 0, size_ = 0;
};

// Hands out parts of a workspace; with a null base it measures.
struct Arena {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        char* p = base ? base + used : nullptr;
        used += round_up(count * sizeof(T), 64) + 64;
        return (T*)p;
    }
    template <class T>
    List<T> list(size_t capacity) {
        return {take<T>(capacity), capacity};
    }
};

// What a team needs for the chunk of rows it works on.
struct ChunkSpace {
    char* packed;            // rows of the hidden size, packed
    char* packed_inner;      // rows of the feed-forward's inner size, packed
    char* inner;             // the same before quantisation; where it is gated, beside it what it is multiplied by
    char* projected;         // queries, keys and values, exchange type [rows, query size + 2 · key size]
    char* first_queries;     // exchange type [sequences, query size]
    float *sums, *attended;  // [rows, hidden]
    float* received;         // [heads, rows]
    float* row_scale;        // [rows]
    float* codes;            // [rows, rank]
    char *given, *woven;     // keys and values of context tokens, of all, exchange type [rows, 2 · key size]
};

struct ThreadSpace {
    char* product;
    char* attention;
    char* distance_rows;          // a head's queries or keys, packed
    float *of_queries, *of_keys;  // what they are multiplied to, see DistanceTerms
};

struct Range {
    int begin, end;
    int size() const { return end - begin; }
};

// The part of [0, count) that falls to a rank, in multiples of `step`.
Range share(int count, int rank, int threads, int step = 1) {
    const long units = (count + step - 1) / step;
    return {(int)std::min<long>(count, units * rank / threads * step),
            (int)std::min<long>(count, units * (rank + 1) / threads * step)};
}

}  // namespace

// One forward pass. All its threads run `work`; they either share every chunk of rows (a small batch: each takes some
// columns of every product, so that the weights are read once), or take chunks in turn.
class Pass {
public:
    Pass(const Encoder& encoder, const Request& request)
        : encoder_(encoder),
          kernels_(encoder.kernels),
          shape_(encoder.shape),
          tokens_(request.tokens),
          sequences_(request.sequences),
          asked_(std::max(1, request.threads)) {
        for (int s = 0; s < request.sequences; s++)
            longest_ = std::max(longest_, request.cu_seqlens[s + 1] - request.cu_seqlens[s]);
        chunk_rows_ = (int)round_up(std::min(tokens_, std::max(kernels_.chunk_rows, longest_)), 32);
        summaries_wanted_ = request.hosts, probes_wanted_ = request.probes, placed_ = request.places;
        context_maps_ = request.context;
    }

    // Every list and array of the pass, which lies in the workspace itself. Nothing is allocated besides: no thread may
    // fail while others wait for it, and a pass that is never finished leaves nothing behind.
    void lay_out(Arena& arena) {
        const size_t tokens = tokens_, sequences = sequences_, chunks = tokens / 32 + asked_ + 2;
        offsets_ = arena.list<int32_t>(sequences + 1), next_offsets_ = arena.list<int32_t>(sequences + 1);
        original_ = arena.take<int>(tokens), firsts_ = arena.take<int>(sequences);
        if (placed_) places_ = arena.take<int>(tokens);
        angles_ = arena.take<float>(encoder_.rotations.size() * tokens * shape_.head_size);
        kept_ = arena.list<int>(tokens), dropped_ = arena.list<int>(tokens), left_ = arena.list<int>(tokens);
        sequence_chunks_ = arena.list<Range>(sequences);
        row_chunks_ = arena.list<Range>(chunks), dropped_chunks_ = arena.list<Range>(chunks);
        const size_t hidden = shape_.hidden;
        if (summaries_wanted_) {
            summaries_ = arena.list<Summary>(SEGMENTS * sequences);
            summary_of_kept_ = arena.list<int>(tokens), summary_of_dropped_ = arena.list<int>(tokens);
            shares_ = arena.list<float>(tokens);
            gone_ = arena.take<float>(tokens * hidden);
            means_ = arena.take<float>(SEGMENTS * sequences * hidden);
        }
        if (probes_wanted_) joined_ = arena.take<float>(tokens * hidden);
        if (context_maps_) {
            others_ = arena.list<int>(tokens), other_offsets_ = arena.list<int32_t>(sequences + 1);
            key_rows_ = arena.list<int>(tokens), key_offsets_ = arena.list<int32_t>(sequences + 1);
            key_places_ = arena.take<int>(tokens), key_of_row_ = arena.take<int>(tokens);
            is_context_ = arena.take<uint8_t>(tokens);
            codes_ = arena.take<float>(tokens * context_maps_->rank);
        }
        const size_t inner = shape_.inner, rows = chunk_rows_, wide = exchange();
        states_[0] = arena.take<float>(tokens * hidden);
        states_[1] = arena.take<float>(tokens * hidden);
        const size_t queries = shape_.query_size(), inputs = queries + 2 * shape_.key_size();
        context_ = arena.take<char>(tokens * queries * wide);
        received_ = arena.take<float>(tokens);
        const size_t rank = context_maps_ ? context_maps_->rank : 0;
        const size_t widest = std::max<size_t>({hidden, queries, (size_t)encoder_.embeddings.size, rank});
        const int head = shape_.head_size;
        const size_t unpacked = shape_.gated ? 2 * inner : kernels_.quantized ? inner : 0;
        chunks_ = arena.take<ChunkSpace>(asked_), scratch_ = arena.take<ThreadSpace>(asked_);
        for (int t = 0; t < asked_; t++) {
            ChunkSpace c{};
            c.packed = arena.take<char>(kernels_.packed_rows_bytes(rows, widest));
            c.packed_inner = arena.take<char>(kernels_.packed_rows_bytes(rows, inner));
            c.inner = arena.take<char>(rows * unpacked * wide);
            c.projected = arena.take<char>(rows * inputs * wide);
            c.first_queries = arena.take<char>(rows * queries * wide);
            c.sums = arena.take<float>(rows * hidden);
            c.attended = arena.take<float>(rows * widest);
            c.received = arena.take<float>(rows * shape_.heads);
            c.row_scale = arena.take<float>(rows);
            if (context_maps_) {
                c.codes = arena.take<float>(rows * rank);
                c.given = arena.take<char>(rows * keys_and_values() * wide);
                c.woven = arena.take<char>(rows * keys_and_values() * wide);
            }
            ThreadSpace s{};
            const size_t most = std::max<size_t>({inner, widest, context_maps_ ? (size_t)keys_and_values() : 0});
            size_t product =
                std::max(kernels_.product_scratch(rows, inner, hidden), kernels_.product_scratch(rows, widest, most));
            if (by_distance())
                product = std::max(
                    product, encoder_.distance_kernels->product_scratch(longest_, head, encoder_.distances.count()));
            s.product = arena.take<char>(product);
            s.attention = arena.take<char>(kernels_.attention_scratch(longest_, shape_.head_size));
            if (by_distance()) {
                s.distance_rows = arena.take<char>(encoder_.distance_kernels->packed_rows_bytes(longest_, head));
                s.of_queries = arena.take<float>(longest_ * distance_stride());
                s.of_keys = arena.take<float>(longest_ * distance_stride());
            }
            if (arena.base) chunks_[t] = c, scratch_[t] = s;
        }
    }

    // Runs until a decision is wanted, or to the end. True: done.
    bool run(Request& request) {
        request_ = &request;
        fresh_ = !request.waiting;
        request.waiting = false;
        if (fresh_) {
            std::copy_n(request.cu_seqlens, sequences_, firsts_);
            int rows = 0;
            offsets_.push_back(0);
            for (int s = 0; s < sequences_; s++) {
                for (int t = request.cu_seqlens[s]; t < request.cu_seqlens[s + 1]; t++) {
                    const bool outside = request.outside && request.outside[t];
                    if (!outside) original_[rows++] = t;
                    if (context_maps_) is_context_[t] = outside;
                }
                offsets_.push_back(rows);
            }
            for (int i = 0; placed_ && i < rows; i++) places_[i] = request.places[original_[i]];
            for (int i = 0; request.hosts && i < SEGMENTS * sequences_; i++) summaries_.push_back(Summary());
        }
        auto begin = [&](int, int threads) {
            barrier_.expect(threads);
            next_.store(0);
            if (fresh_) {
                plan_keys();
                plan(threads);
                if (has_context()) plan_rows(threads, (int)others_.size(), dropped_chunks_);
            } else
                apply_decision(layer_, threads);
        };
        auto work_ = [&](int rank, int threads) {
            kernels_.enter();
            work(rank, threads);
            kernels_.leave();
        };
        run_on_team(asked_, begin, work_);
        return !request.waiting;
    }

private:
    // A barrier among the threads that share a chunk: all of them, or none.
    struct Team {
        int rank, threads;
        Barrier* barrier;
        ChunkSpace* chunk;
        ThreadSpace* scratch;
        bool timed;
        void wait() const {  // alone there is nobody to wait for
            if (threads > 1) barrier->wait();
        }
    };

    // What a sequence has dropped from one of its segments.
    struct Summary {
        bool exists = false;
        float weight = 0;     // importance gathered in earlier layers
        float gathered = 0;   // and in this one
        float own_share = 1;  // of the summary's state so far in the merged one
    };

    struct Clock {
        Clock(const Pass& pass, const Team& team, Part part)
            : seconds_(pass.request_->seconds && team.timed ? pass.request_->seconds + part : nullptr) {
            if (seconds_) start_ = std::chrono::steady_clock::now();
        }
        ~Clock() {
            if (seconds_) *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
        }
        double* seconds_;
        std::chrono::steady_clock::time_point start_;
    };

    // How the rows that are left are worked on until the next decision.
    void plan(int threads) {
        // A thread of its own per chunk pays only when every thread has enough rows to make up for reading all weights.
        together_ = threads > 1 && offsets_.back() < threads * MIN_ROWS_APART;
        plan_sequences(threads);
        plan_rows(threads, offsets_.back(), row_chunks_);
    }

    Team team_of(int rank, int threads) {
        return {together_ ? rank : 0,           together_ ? threads : 1, &barrier_,
                &chunks_[together_ ? 0 : rank], &scratch_[rank],         rank == 0};
    }

    void work(int rank, int threads) {
        Team team = team_of(rank, threads);
        if (fresh_) {
            take(team, row_chunks_, [&](Range r) {
                embed(team, original_ + r.begin, r.size(), states_[0] + (size_t)r.begin * shape_.hidden);
            });
            restart(rank);
            if (!dropped_chunks_.empty()) {
                take(team, dropped_chunks_, [&](Range r) { embed_outside(team, r); });
                restart(rank);
            }
        }
        for (int layer = fresh_ ? 0 : layer_; layer < shape_.layers; layer++) {
            if (fresh_ || layer != layer_) {  // else this is where the decision was waited for
                take(team, sequence_chunks_,
                     [&](Range r) { first_rows_only(layer) ? attend_first(team, layer, r) : attend(team, layer, r); });
                if (joins(layer)) {
                    restart(rank);
                    take(team, row_chunks_, [&](Range r) { join(team, layer, r); });
                }
                barrier_.wait();
                if (rank == 0) {
                    Clock clock(*this, team, DECIDE);
                    next_.store(0);
                    if (decides(layer) && request_->keep)
                        ask(layer);
                    else
                        apply_decision(layer, threads);
                }
                barrier_.wait();
                if (request_->waiting) return;
            }
            team = team_of(rank, threads);
            if (!dropped_chunks_.empty()) {
                take(team, dropped_chunks_, [&](Range r) { leave(team, layer, r); });
                barrier_.wait();
                if (rank == 0) {
                    next_.store(0);
                    if (summarizes(layer)) average_dropped();
                }
                barrier_.wait();
            }
            take(team, row_chunks_, [&](Range r) { feed_forward(team, layer, r); });
            barrier_.wait();
            if (rank == 0) {
                std::swap(states_[0], states_[1]);
                if (layer + 1 == shape_.layers) finish();
                next_.store(0);
            }
            barrier_.wait();
        }
    }

    // Between two lists of chunks that are taken in turn.
    void restart(int rank) {
        barrier_.wait();
        if (rank == 0) next_.store(0);
        barrier_.wait();
    }

    template <class Function>
    void take(const Team& team, const List<Range>& chunks, Function function) {
        if (together_) {
            for (Range chunk : chunks) function(chunk), team.wait();
        } else {
            for (size_t i; (i = next_.fetch_add(1)) < chunks.size();) function(chunks[i]);
        }
    }

    bool first_rows_only(int layer) const { return request_->first_only && layer + 1 == shape_.layers; }

    // Groups of whole sequences, as even as their lengths allow.
    void plan_sequences(int threads) {
        sequence_chunks_.clear();
        const List<int32_t>& offsets = has_context() ? key_offsets_ : offsets_;
        const int rows = offsets.back();
        const int groups = chunk_count(threads, rows);
        const int target = std::max(1, (rows + groups - 1) / groups);
        for (int s = 0; s < sequences_;) {
            int end = s + 1;
            while (end < sequences_ && offsets[end + 1] - offsets[s] <= chunk_rows_ &&
                   offsets[end] - offsets[s] + (offsets[end + 1] - offsets[end]) / 2 < target)
                end++;
            sequence_chunks_.push_back({s, end});
            s = end;
        }
        // The longest first, so that the threads end together.
        if (!together_)
            std::sort(sequence_chunks_.begin(), sequence_chunks_.end(), [&](Range a, Range b) {
                const int first = offsets[a.end] - offsets[a.begin], second = offsets[b.end] - offsets[b.begin];
                return first != second ? first > second : a.begin < b.begin;
            });
    }

    int chunk_count(int threads, int rows) const {
        int count = std::max(1, (rows + kernels_.chunk_rows - 1) / kernels_.chunk_rows);
        return together_ ? count : (int)round_up(count, threads);
    }

    void plan_rows(int threads, int rows, List<Range>& chunks) const {
        chunks.clear();
        const int count = chunk_count(threads, rows);
        for (int i = 0; i < count; i++) {
            Range r = share(rows, i, count, 32);
            if (r.size() > 0) chunks.push_back(r);
        }
    }

    void pack(const Team& team, const void* source, bool half, size_t stride, const int* index, int rows, int width,
              char* packed) {
        Clock clock(*this, team, PACK);
        Range part = share(rows, team.rank, team.threads, 16);
        kernels_.pack_rows(source, half, stride, index, part.begin, part.end, rows, width, packed,
                           team.chunk->row_scale);
    }

    void multiply(const Team& team, Part timed, const Linear& linear, const char* packed, int rows, Epilogue epilogue,
                  void* out, size_t out_stride, const float* residual = nullptr, const int* residual_index = nullptr) {
        Clock clock(*this, team, timed);
        Range part = share(panels(kernels_, linear), team.rank, team.threads);
        if (part.size() == 0) return;
        kernels_.multiply({&linear, packed, team.chunk->row_scale, rows, part.begin, part.end, epilogue,
                           shape_.activation, out, out_stride, residual, residual_index, team.scratch->product});
    }

    // The thread's share of rows is the one that it packs.
    void normalize(const Team& team, const float* in, float* out, int rows, int width, const Norm& norm,
                   const int* index = nullptr) {
        Clock clock(*this, team, NORM);
        const Range part = share(rows, team.rank, team.threads, 16);
        if (!index) return normalize(in, out, part, width, norm);
        for (int i = part.begin; i < part.end; i++)
            normalize(in + (size_t)index[i] * width, out + (size_t)i * width, {0, 1}, width, norm);
    }
    void normalize(const float* in, float* out, Range part, int width, const Norm& norm) {
        kernels_.normalize(in, out, part.begin, part.end, width, norm.gamma.data(), norm.beta.data(), shape_.epsilon,
                           shape_.rms_norm);
    }

    const Layer& weights(int layer) const { return encoder_.layers[encoder_.steps[layer].weights]; }

    // Tokens' states from the tables, and their projection where the tables have another width.
    void embed(const Team& team, const int* tokens, int count, float* out) {
        const Embeddings& e = encoder_.embeddings;
        const bool project = e.projection.weight;
        const size_t row = (size_t)e.size * (encoder_.half_tables ? 2 : 4), head = shape_.head_size;
        float* rows = project ? team.chunk->attended : out;
        {
            Clock clock(*this, team, EMBED);
            const Range part = share(count, team.rank, team.threads, 16);
            for (int i = part.begin; i < part.end; i++) {
                const int t = tokens[i];
                kernels_.embed(e.word + request_->ids[t] * row,
                               e.position ? e.position + request_->positions[t] * row : nullptr,
                               e.types ? e.type + (request_->types ? request_->types[t] : 0) * row : nullptr,
                               encoder_.half_tables, e.size, rows + (size_t)i * e.size);
                for (size_t r = 0; r < encoder_.rotations.size(); r++)
                    find_angles(encoder_.rotations[r], request_->positions[t], angles_ + (r * tokens_ + t) * head);
            }
            if (!e.norm.gamma.empty()) normalize(rows, rows, part, e.size, e.norm);
        }
        if (!project) return;
        pack(team, rows, false, e.size, nullptr, count, e.size, team.chunk->packed);
        team.wait();
        multiply(team, EMBED, e.projection, team.chunk->packed, count, Epilogue::store_float, out, shape_.hidden);
        if (e.projected_norm.gamma.empty()) return;
        team.wait();
        normalize(team, out, out, count, shape_.hidden, e.projected_norm);
    }

    // The same of tokens that never enter: their codes, and their states where these are wanted.
    void embed_outside(const Team& team, Range r) {
        const size_t hidden = shape_.hidden;
        const int* tokens = others_.data() + r.begin;
        float* states = team.chunk->sums;
        embed(team, tokens, r.size(), states);
        team.wait();
        const Range part = share(r.size(), team.rank, team.threads, 16);
        for (int i = part.begin; departed_wanted() && i < part.end; i++)
            give(states + i * hidden, request_->out + tokens[i] * hidden);
        encode(team, states, nullptr, r.size(), context_maps_->down[0], tokens);
    }

    // A token's last state, which left.
    void give(const float* state, float* out) {
        if (request_->unread)
            memcpy(out, state, shape_.hidden * sizeof(float));
        else
            finish(state, out);
    }

    // Codes of tokens that leave, from their states, by `index` where that is not null.
    void encode(const Team& team, const float* states, const int* index, int rows, const Linear& down,
                const int* tokens) {
        const size_t rank = context_maps_->rank;
        pack(team, states, false, shape_.hidden, index, rows, shape_.hidden, team.chunk->packed);
        team.wait();
        multiply(team, OUTPUT, down, team.chunk->packed, rows, Epilogue::store_float, team.chunk->codes, rank);
        team.wait();
        const Range part = share(rows, team.rank, team.threads, 16);
        for (int i = part.begin; i < part.end; i++)
            memcpy(codes_ + tokens[i] * rank, team.chunk->codes + i * rank, rank * sizeof(float));
    }

    // Keys and values of sequences: their rows' own, and those of their context tokens, as their tokens stand in the
    // text. They begin with those of the first sequence.
    struct Keys {
        const char* rows;
        size_t stride;
        const int* places;
        const List<int32_t>& offsets;
        int first;
        int at(int sequence) const { return offsets[sequence] - first; }
        int count(int sequence) const { return offsets[sequence + 1] - offsets[sequence]; }
        int total(Range sequences) const { return offsets[sequences.end] - first; }
    };

    Keys keys_of(const Team& team, int layer, Range sequences) {
        const int first = offsets_[sequences.begin];
        if (!has_context() || other_offsets_[sequences.begin] == other_offsets_[sequences.end])
            return {projected(team, 0, keys_at()), (size_t)inputs(), places_, offsets_, first};
        const int begin = other_offsets_[sequences.begin], others = other_offsets_[sequences.end] - begin;
        const size_t width = keys_and_values(), bytes = width * exchange();
        const int rank = context_maps_->rank;
        pack(team, codes_, false, rank, others_.data() + begin, others, rank, team.chunk->packed);
        team.wait();
        multiply(team, PROJECT, context_maps_->up[layer], team.chunk->packed, others, Epilogue::store,
                 team.chunk->given, width);
        team.wait();
        rotate(team, layer, team.chunk->given, width, others, shape_.key_heads, others_.data() + begin);
        Clock clock(*this, team, ATTEND);
        const int first_key = key_offsets_[sequences.begin];
        const Range part = share(key_offsets_[sequences.end] - first_key, team.rank, team.threads, 16);
        for (int i = part.begin; i < part.end; i++) {
            const int row = key_rows_[first_key + i];
            memcpy(team.chunk->woven + i * bytes,
                   row >= 0 ? projected(team, row - first, keys_at()) : team.chunk->given + (~row - begin) * bytes,
                   bytes);
        }
        team.wait();
        return {team.chunk->woven, width, key_places_, key_offsets_, first_key};
    }

    // Cosines and sines of a position, as Kernels::rotate reads them.
    static void find_angles(const Rotation& rotation, int position, float* to) {
        const size_t half = rotation.frequencies.size();
        for (size_t i = 0; i < half; i++) {
            const float angle = (float)position * rotation.frequencies[i];
            to[i] = std::cos(angle) * rotation.factor, to[half + i] = std::sin(angle) * rotation.factor;
        }
    }

    // Queries, keys and values lie side by side.
    int inputs() const { return shape_.query_size() + 2 * shape_.key_size(); }
    int keys_at() const { return shape_.query_size(); }
    int values_at() const { return shape_.query_size() + shape_.key_size(); }
    int keys_and_values() const { return 2 * shape_.key_size(); }
    char* projected(const Team& team, int row, int column) const {
        return team.chunk->projected + ((size_t)row * inputs() + column) * exchange();
    }
    char* context(int row, int column) const {
        return context_ + ((size_t)row * shape_.query_size() + column) * exchange();
    }
    size_t exchange() const { return kernels_.half ? 2 : 4; }

    void project(const Team& team, const Linear& linear, int rows, int column) {
        multiply(team, PROJECT, linear, team.chunk->packed, rows, Epilogue::store, projected(team, 0, column),
                 inputs());
    }

    // The rows of whole sequences that enter attention, packed. The normalized ones are left in `attended`.
    void pack_entering(const Team& team, const Layer& l, int first, int rows) {
        const int hidden = shape_.hidden;
        const float* entering = states_[0] + (size_t)first * hidden;
        if (normalizes_before(l)) {
            normalize(team, entering, team.chunk->attended, rows, hidden, l.attention_norm);
            entering = team.chunk->attended;
        }
        pack(team, entering, false, hidden, nullptr, rows, hidden, team.chunk->packed);
        team.wait();
    }

    bool normalizes_before(const Layer& l) const { return shape_.norm_first && !l.attention_norm.gamma.empty(); }

    // Turns `heads` heads of the rows by their positions; the tokens that they are begin at `tokens`.
    void rotate(const Team& team, int layer, char* heads_at, size_t stride, int rows, int heads, const int* tokens) {
        const int which = encoder_.steps[layer].rotation;
        if (which < 0) return;
        Clock clock(*this, team, ATTEND);
        const Range part = share(rows, team.rank, team.threads, 16);
        kernels_.rotate(heads_at, stride, part.begin, part.end, heads, shape_.head_size,
                        angles_ + (size_t)which * tokens_ * shape_.head_size, tokens);
        team.wait();
    }

    // What a layer adds to the logits of a head, by the places of queries, from a row on, and of a sequence's keys.
    LogitTerms terms(int layer, int head, int row, const Keys& keys, int sequence,
                     const DistanceTerms& distance) const {
        const DistanceBias& bias = encoder_.bias;
        const int window = encoder_.steps[layer].window;
        if (bias.table.empty() && window < 0 && !distance.columns) return {};
        return {places_ + row, keys.places + keys.offsets[sequence],
                window,        bias.table.empty() ? nullptr : bias.table.data() + (size_t)head * (2 * bias.far + 1),
                bias.far,      distance};
    }

    bool by_distance() const { return !encoder_.distances.columns.empty(); }
    // Of rows that kernels may write in panels of 32, in an odd number of cache lines: rows a power of two apart would
    // share few of a cache's sets.
    size_t distance_stride() const { return round_up(encoder_.distances.count(), 32) + DISTANCE_EDGE + 16; }

    // Multiplies a head's queries and keys for disentangled attention, for the distances that occur: those of a
    // sequence's first `queries` rows from all of its keys.
    DistanceTerms multiply_by_distance(const Team& team, const Layer& l, int head, int sequence, const char* query,
                                       size_t query_stride, int queries, const Keys& keys, const char* key) const {
        if (!l.distance.any()) return {};
        const Kernels& kernels = *encoder_.distance_kernels;
        const DistanceColumns& distances = encoder_.distances;
        const int *query_places = places_ + offsets_[sequence], *key_places = keys.places + keys.offsets[sequence];
        const int count = keys.count(sequence);
        const int first_panel = distances.of(query_places[0] - key_places[count - 1]) / kernels.panel;
        const int last_panel = distances.of(query_places[queries - 1] - key_places[0]) / kernels.panel + 1;
        const size_t stride = distance_stride();
        auto product = [&](const std::vector<Linear>& by, const char* rows, size_t row_stride, int count,
                           float* out) -> const float* {
            if (by.empty()) return nullptr;
            kernels.pack_rows(rows, kernels.half, row_stride, nullptr, 0, count, count, shape_.head_size,
                              team.scratch->distance_rows, nullptr);
            kernels.multiply({&by[head], team.scratch->distance_rows, nullptr, count, first_panel, last_panel,
                              Epilogue::store_float, shape_.activation, out, stride, nullptr, nullptr,
                              team.scratch->product});
            return out;
        };
        return {product(l.distance.of_queries, query, query_stride, queries, team.scratch->of_queries),
                product(l.distance.of_keys, key, keys.stride, count, team.scratch->of_keys), stride,
                distances.columns.data(), distances.far};
    }

    // Attention of whole sequences: contexts, and what each token received where the layer prunes.
    void attend(const Team& team, int layer, Range sequences) {
        const Layer& l = weights(layer);
        const int first = offsets_[sequences.begin], rows = offsets_[sequences.end] - first;
        pack_entering(team, l, first, rows);
        project(team, l.query, rows, 0);
        project(team, l.key, rows, keys_at());
        project(team, l.value, rows, values_at());
        team.wait();
        rotate(team, layer, projected(team, 0, 0), inputs(), rows, shape_.heads + shape_.key_heads, original_ + first);
        const Keys keys = keys_of(team, layer, sequences);
        const int all_keys = keys.total(sequences);
        Clock clock(*this, team, ATTEND);
        const bool receive = decides(layer) && !joins(layer);
        const int size = shape_.head_size, heads = shape_.heads;
        const Range items = share(sequences.size() * heads, team.rank, team.threads);
        for (int item = items.begin; item < items.end; item++) {
            const int s = sequences.begin + item / heads, head = item % heads, at = offsets_[s] - first,
                      count = offsets_[s + 1] - offsets_[s], shared = head / (heads / shape_.key_heads);
            const char* key = keys.rows + (keys.at(s) * keys.stride + shared * size) * exchange();
            float* received = receive ? team.chunk->received + (size_t)head * all_keys + keys.at(s) : nullptr;
            const DistanceTerms by =
                multiply_by_distance(team, l, head, s, projected(team, at, head * size), inputs(), count, keys, key);
            const Range asking = receive ? asking_rows(s) : Range{0, count};
            // What rows pay is added up in the kernel, so those that do not count go there by themselves.
            for (Range queries : {Range{0, asking.begin}, asking, Range{asking.end, count}}) {
                if (queries.size() == 0) continue;
                DistanceTerms these = by;
                if (by.of_queries) these.of_queries += queries.begin * by.stride;
                kernels_.attend({projected(team, at + queries.begin, head * size), key,
                                 key + shape_.key_size() * exchange(), (size_t)inputs(), keys.stride, queries.size(),
                                 keys.count(s), size, shape_.scale, context(offsets_[s] + queries.begin, head * size),
                                 (size_t)shape_.query_size(), queries.begin == asking.begin ? received : nullptr,
                                 team.scratch->attention,
                                 terms(layer, head, offsets_[s] + queries.begin, keys, s, these)});
            }
        }
        if (!receive) return;
        team.wait();
        // Heads are added in order whatever thread computed them.
        const Range part = share(rows, team.rank, team.threads, 16);
        float* total = received_ + first;
        for (int i = part.begin; i < part.end; i++) total[i] = 0;
        const bool woven = keys.rows == team.chunk->woven;
        for (int head = 0; head < heads; head++) {
            const float* by_key = team.chunk->received + (size_t)head * all_keys;
            for (int i = part.begin; i < part.end; i++)
                total[i] += by_key[woven ? key_of_row_[first + i] - keys.first : i];
        }
        for (int i = part.begin; i < part.end; i++) total[i] /= (float)heads;
        for (int s = sequences.begin; request_->asks && s < sequences.end; s++) {
            const int from = offsets_[s] - first, to = offsets_[s + 1] - first;
            const float factor = (float)(to - from) / (float)asking_rows(s).size();
            for (int i = std::max(part.begin, from); i < std::min(part.end, to); i++) total[i] *= factor;
        }
    }

    // The rows of a sequence, counted from its first, whose attention counts.
    Range asking_rows(int sequence) const {
        const int count = offsets_[sequence + 1] - offsets_[sequence];
        const int* tokens = original_ + offsets_[sequence];
        int begin = 0;
        while (request_->asks && begin < count && !request_->asks[tokens[begin]]) begin++;
        if (!request_->asks || begin == count) return {0, count};
        int end = begin;
        while (end < count && request_->asks[tokens[end]]) end++;
        return {begin, end};
    }

    // The last layer where only first tokens are wanted: keys and values of every token, one query per sequence.
    void attend_first(const Team& team, int layer, Range sequences) {
        if (decides(layer)) {  // only to record what would be removed
            attend(team, layer, sequences);
            team.wait();
        }
        const Layer& l = weights(layer);
        const int first = offsets_[sequences.begin], rows = offsets_[sequences.end] - first, hidden = shape_.hidden;
        pack_entering(team, l, first, rows);
        project(team, l.key, rows, keys_at());
        project(team, l.value, rows, values_at());
        team.wait();
        const float* asking = states_[0];
        const int* index = offsets_.data() + sequences.begin;
        if (normalizes_before(l)) {  // the first rows of what was normalized, which other threads may have done
            const Range part = share(sequences.size(), team.rank, team.threads, 16);
            for (int i = part.begin; i < part.end; i++)
                std::copy_n(team.chunk->attended + (size_t)(index[i] - first) * hidden, hidden,
                            team.chunk->sums + (size_t)i * hidden);
            asking = team.chunk->sums, index = nullptr;
        }
        pack(team, asking, false, hidden, index, sequences.size(), hidden, team.chunk->packed);
        team.wait();
        const size_t queries = shape_.query_size();
        multiply(team, PROJECT, l.query, team.chunk->packed, sequences.size(), Epilogue::store,
                 team.chunk->first_queries, queries);
        team.wait();
        rotate(team, layer, projected(team, 0, keys_at()), inputs(), rows, shape_.key_heads, original_ + first);
        rotate(team, layer, team.chunk->first_queries, queries, sequences.size(), shape_.heads,
               firsts_ + sequences.begin);
        const Keys keys = keys_of(team, layer, sequences);
        Clock clock(*this, team, ATTEND);
        const int size = shape_.head_size, heads = shape_.heads;
        const Range items = share(sequences.size() * heads, team.rank, team.threads);
        for (int item = items.begin; item < items.end; item++) {
            const int s = sequences.begin + item / heads, head = item % heads,
                      shared = head / (heads / shape_.key_heads);
            const char *query =
                           team.chunk->first_queries + ((s - sequences.begin) * queries + head * size) * exchange(),
                       *key = keys.rows + (keys.at(s) * keys.stride + shared * size) * exchange();
            const DistanceTerms by = multiply_by_distance(team, l, head, s, query, queries, 1, keys, key);
            kernels_.attend({query, key, key + shape_.key_size() * exchange(), queries, keys.stride, 1, keys.count(s),
                             size, shape_.scale, context(offsets_[s], head * size), queries, nullptr,
                             team.scratch->attention, terms(layer, head, offsets_[s], keys, s, by)});
        }
    }

    // Output projection and residual of the given rows, and the norm where that comes after.
    void finish_attention(const Team& team, const Layer& l, const int* index, int begin, int rows, float* out) {
        const int hidden = shape_.hidden, queries = shape_.query_size();
        ChunkSpace& c = *team.chunk;
        pack(team, index ? context_ : context(begin, 0), kernels_.half, queries, index, rows, queries, c.packed);
        team.wait();
        multiply(team, OUTPUT, l.output, c.packed, rows, Epilogue::residual, shape_.norm_first ? out : c.sums, hidden,
                 index ? states_[0] : states_[0] + (size_t)begin * hidden, index);
        team.wait();
        if (!shape_.norm_first) normalize(team, c.sums, out, rows, hidden, l.attention_norm);
    }

    // The same of all rows, before the decision, and what the layer's probe says of them.
    void join(const Team& team, int layer, Range r) {
        const size_t hidden = shape_.hidden;
        finish_attention(team, weights(layer), nullptr, r.begin, r.size(), joined_ + r.begin * hidden);
        Clock clock(*this, team, DECIDE);
        const float* probe = request_->probes + layer * (hidden + 1);
        const Range part = share(r.size(), team.rank, team.threads, 16);  // the rows that this thread has normalized
        for (int i = r.begin + part.begin; i < r.begin + part.end; i++)
            received_[i] = score(joined_ + i * hidden, probe, (int)hidden);
    }

    // probe[0, size) · row + probe[size], in a few sums that need not wait for each other.
    static float score(const float* row, const float* probe, int size) {
        constexpr int SUMS = 8;
        double sums[SUMS] = {};
        const int whole = size / SUMS * SUMS;
        for (int k = 0; k < whole; k += SUMS)
            for (int i = 0; i < SUMS; i++) sums[i] += (double)row[k + i] * probe[k + i];
        double total = probe[size];
        for (int k = whole; k < size; k++) total += (double)row[k] * probe[k];
        for (double sum : sums) total += sum;
        return (float)total;
    }

    // Tokens that leave after this layer's attention: their last state is that of the attention block.
    void leave(const Team& team, int layer, Range r) {
        const size_t hidden = shape_.hidden, bytes = hidden * sizeof(float);
        const int* rows = dropped_.data() + r.begin;
        const bool joined = joins(layer);
        if (!joined) finish_attention(team, weights(layer), rows, 0, r.size(), team.chunk->attended);
        const Range part = share(r.size(), team.rank, team.threads, 16);
        for (int i = part.begin; i < part.end; i++) {
            const float* state = joined ? joined_ + rows[i] * hidden : team.chunk->attended + i * hidden;
            if (departed_wanted()) give(state, request_->out + left_[r.begin + i] * hidden);
            if (summarizes(layer)) memcpy(gone_ + (r.begin + i) * hidden, state, bytes);
        }
        if (becomes_context(layer))
            encode(team, joined ? joined_ : team.chunk->attended, joined ? rows : nullptr, r.size(),
                   context_maps_->down[layer + 1], left_.data() + r.begin);
    }

    // What this layer's dropped tokens add to their summaries, by importance.
    void average_dropped() {
        const size_t hidden = shape_.hidden;
        for (size_t i = 0; i < summaries_.size(); i++)
            if (summaries_[i].gathered != 0) std::fill_n(means_ + i * hidden, hidden, 0.0f);
        for (size_t i = 0; i < dropped_.size(); i++) {
            float* mean = means_ + summary_of_dropped_[i] * hidden;
            for (size_t k = 0; k < hidden; k++) mean[k] += shares_[i] * gone_[i * hidden + k];
        }
    }

    // Rows that carry a summary take up what was dropped; `rows` are those of `kept_` from `begin` on.
    void merge_summaries(float* rows, int begin, Range part) const {
        const size_t hidden = shape_.hidden;
        for (int i = part.begin; i < part.end; i++) {
            const int which = summary_of_kept_[begin + i];
            if (which < 0 || summaries_[which].gathered == 0) continue;
            float* row = rows + i * hidden;
            const float *mean = means_ + which * hidden, own = summaries_[which].own_share;
            for (size_t k = 0; k < hidden; k++) row[k] = own * row[k] + mean[k];
        }
    }

    // The rest of the layer for the rows that stay.
    void feed_forward(const Team& team, int layer, Range r) {
        const Layer& l = weights(layer);
        const int rows = r.size(), hidden = shape_.hidden;
        ChunkSpace& c = *team.chunk;
        const int* index = gather_ ? kept_.data() + r.begin : nullptr;
        const float* attended = c.attended;
        if (joins(layer)) {
            attended = index ? joined_ : joined_ + (size_t)r.begin * hidden;
        } else {
            finish_attention(team, l, index, r.begin, rows, c.attended);
            if (gather_ && summarizes(layer))
                merge_summaries(c.attended, r.begin, share(rows, team.rank, team.threads, 16));
            index = nullptr;  // they are gathered now
        }
        if (shape_.norm_first) {
            normalize(team, attended, c.sums, rows, hidden, l.output_norm, index);
            pack(team, c.sums, false, hidden, nullptr, rows, hidden, c.packed);
        } else {
            pack(team, attended, false, hidden, index, rows, hidden, c.packed);
        }
        team.wait();
        widen(team, l, rows);
        float* out = states_[1] + (size_t)r.begin * hidden;
        multiply(team, DOWN, l.down, c.packed_inner, rows, Epilogue::residual, shape_.norm_first ? out : c.sums, hidden,
                 attended, index);
        team.wait();
        if (!shape_.norm_first) normalize(team, c.sums, out, rows, hidden, l.output_norm);
    }

    // The feed-forward's first half, from packed rows to packed rows.
    void widen(const Team& team, const Layer& l, int rows) {
        const int inner = shape_.inner;
        ChunkSpace& c = *team.chunk;
        if (shape_.gated) {
            multiply(team, UP, l.gate, c.packed, rows, Epilogue::store, c.inner, 2 * inner);
            multiply(team, UP, l.up, c.packed, rows, Epilogue::store, c.inner + inner * exchange(), 2 * inner);
            team.wait();
            const Range part = share(rows, team.rank, team.threads, 16);
            kernels_.gate(c.inner, 2 * inner, part.begin, part.end, inner, shape_.activation);
            pack(team, c.inner, kernels_.half, 2 * inner, nullptr, rows, inner, c.packed_inner);
        } else if (kernels_.quantized) {
            multiply(team, UP, l.up, c.packed, rows, Epilogue::activate_store, c.inner, inner);
            team.wait();
            pack(team, c.inner, kernels_.half, inner, nullptr, rows, inner, c.packed_inner);
        } else {
            multiply(team, UP, l.up, c.packed, rows, Epilogue::activate_pack, c.packed_inner, inner);
        }
        team.wait();
    }

    // Whether decisions are taken in this layer.
    bool decides(int layer) const {
        if (!request_->thresholds && !request_->keep) return false;
        return request_->prunes[layer] && (request_->record || !first_rows_only(layer));
    }

    // Whether it is a probe that they go by.
    bool joins(int layer) const { return request_->probed && request_->probed[layer] && decides(layer); }

    bool departed_wanted() const { return request_->departed && !request_->first_only; }
    // Whether tokens that leave after a layer are attended to still.
    bool becomes_context(int layer) const {
        return context_maps_ && layer + 1 < shape_.layers && context_maps_->down[layer + 1].weight;
    }
    bool has_context() const { return context_maps_ && !others_.empty(); }

    // Rows and context tokens of each sequence, in their order in the text.
    void plan_keys() {
        if (!context_maps_) return;
        others_.clear(), other_offsets_.clear(), key_rows_.clear(), key_offsets_.clear();
        other_offsets_.push_back(0), key_offsets_.push_back(0);
        for (int s = 0; s < sequences_; s++) {
            int row = offsets_[s];
            for (int t = request_->cu_seqlens[s]; t < request_->cu_seqlens[s + 1]; t++) {
                const bool present = row < offsets_[s + 1] && original_[row] == t;
                if (!present && !is_context_[t]) continue;
                if (placed_) key_places_[key_rows_.size()] = request_->places[t];
                if (present) key_of_row_[row] = (int)key_rows_.size();
                key_rows_.push_back(present ? row++ : ~(int)others_.size());
                if (!present) others_.push_back(t);
            }
            other_offsets_.push_back((int)others_.size()), key_offsets_.push_back((int)key_rows_.size());
        }
    }
    bool summarizes(int layer) const { return request_->hosts && layer + 1 < shape_.layers; }
    bool is_summary(int row) const { return request_->hosts && request_->hosts[original_[row]]; }

    // The summary that a row goes to, or is.
    int summary_of(int sequence, int row) const {
        return SEGMENTS * sequence + (request_->segments ? request_->segments[original_[row]] : 0);
    }

    // A token leaves. Its row stays where it is the first of its segment's to do so, and carries the summary.
    void drop_into_summary(int sequence, int row) {
        const int which = summary_of(sequence, row);
        Summary& summary = summaries_[which];
        const float weight = std::max(received_[row], SMALLEST_WEIGHT);
        summary.gathered += weight;
        summary_of_dropped_.push_back(which), shares_.push_back(weight);
        if (summary.exists) return;
        summary.exists = true;
        request_->hosts[original_[row]] = 1;
        kept_.push_back(row), summary_of_kept_.push_back(which);
    }

    // Weights become shares of the merged summaries.
    void share_summaries() {
        for (Summary& s : summaries_) s.own_share = s.weight / std::max(s.weight + s.gathered, SMALLEST_WEIGHT);
        for (size_t i = 0; i < shares_.size(); i++) {
            const Summary& s = summaries_[summary_of_dropped_[i]];
            shares_[i] /= s.weight + s.gathered;
        }
        for (Summary& s : summaries_) s.weight += s.gathered;
    }

    // Leaves a decision to the caller. What keep has until it is written is no decision.
    void ask(int layer) {
        const int rows = offsets_.back();
        request_->layer = layer_ = layer, request_->rows = rows;
        std::copy_n(received_, rows, request_->importance);
        std::fill_n(request_->keep, rows, UNDECIDED);
        request_->waiting = true;
    }

    void apply_decision(int layer, int threads) {
        const int rows = offsets_.back();
        kept_.clear(), dropped_.clear(), left_.clear(), dropped_chunks_.clear();
        gather_ = false;
        if (!decides(layer)) {
            for (int i = 0; i < rows; i++)
                if (!is_summary(i)) request_->survived[original_[i]]++;
        } else {
            if (request_->received)
                for (int i = 0; i < rows; i++)
                    request_->received[(size_t)layer * tokens_ + original_[i]] = received_[i];
            next_offsets_.clear(), next_offsets_.push_back(0);
            summary_of_kept_.clear(), summary_of_dropped_.clear(), shares_.clear();
            for (Summary& s : summaries_) s.gathered = 0;
            for (int s = 0; s < sequences_; s++) {
                const int count = offsets_[s + 1] - offsets_[s];
                const float divisor = joins(layer) ? 1.0f : request_->divisor > 0 ? request_->divisor : (float)count;
                for (int i = offsets_[s]; i < offsets_[s + 1]; i++) {
                    const bool keep =
                        request_->keep ? request_->keep[i] != 0 : received_[i] / divisor >= request_->thresholds[layer];
                    const bool summary = is_summary(i), stays = request_->stays && request_->stays[original_[i]];
                    if (i == offsets_[s] || keep || stays || summary) {
                        kept_.push_back(i);
                        if (request_->hosts) summary_of_kept_.push_back(summary ? summary_of(s, i) : -1);
                        if (!summary) request_->survived[original_[i]]++;
                    } else {
                        dropped_.push_back(i), left_.push_back(original_[i]);
                        if (summarizes(layer)) drop_into_summary(s, i);
                    }
                }
                next_offsets_.push_back((int32_t)kept_.size());
            }
            if (summarizes(layer)) share_summaries();
            gather_ = !dropped_.empty();
            if (gather_ && !first_rows_only(layer)) {
                for (size_t i = 0; i < kept_.size(); i++) original_[i] = original_[kept_[i]];
                for (size_t i = 0; placed_ && i < kept_.size(); i++) places_[i] = places_[kept_[i]];
                std::swap(offsets_, next_offsets_);
                for (size_t i = 0; becomes_context(layer) && i < left_.size(); i++) is_context_[left_[i]] = 1;
                plan_keys();
            }
        }
        if (first_rows_only(layer)) {
            kept_.clear();
            for (int s = 0; s < sequences_; s++) kept_.push_back(offsets_[s]);
            gather_ = true;
            plan_rows(threads, (int)kept_.size(), row_chunks_);
            return;
        }
        plan(threads);
        if (departed_wanted() || summarizes(layer) || becomes_context(layer))
            plan_rows(threads, (int)dropped_.size(), dropped_chunks_);
    }

    // After the last layer: what is wanted of the states that are left.
    void finish() {
        const size_t hidden = shape_.hidden;
        if (request_->first_only) {
            for (int s = 0; s < sequences_; s++) finish(states_[0] + s * hidden, request_->out + s * hidden);
            return;
        }
        for (int i = 0; i < offsets_.back(); i++)
            if (!is_summary(i)) finish(states_[0] + i * hidden, request_->out + original_[i] * hidden);
    }
    void finish(const float* state, float* out) {
        const Norm& norm = encoder_.last_norm;
        if (norm.gamma.empty())
            memcpy(out, state, shape_.hidden * sizeof(float));
        else
            normalize(state, out, {0, 1}, shape_.hidden, norm);
    }

    static constexpr int MIN_ROWS_APART = 96;
    static constexpr int SEGMENTS = 2;               // summary tokens a sequence can have
    static constexpr float SMALLEST_WEIGHT = 1e-6f;  // attention received can underflow to 0
    static constexpr uint8_t UNDECIDED = 2;

    const Encoder& encoder_;
    const Kernels& kernels_;
    const Shape& shape_;
    Request* request_ = nullptr;
    const int tokens_, sequences_, asked_;
    int longest_ = 0, chunk_rows_ = 0;
    bool summaries_wanted_ = false, probes_wanted_ = false, placed_ = false, together_ = false;
    bool fresh_ = true;  // whether this call began the pass; else it goes on in `layer_`, whose decision is there now
    int layer_ = 0;

    float* states_[2];  // rows that entered the layer, rows that leave it
    char* context_;
    float* received_;          // by row, attention received or a probe's score: what the layer decides by
    float* joined_ = nullptr;  // rows after the attention block, where a probe reads them
    ChunkSpace* chunks_;
    ThreadSpace* scratch_;

    List<int32_t> offsets_;  // cu_seqlens of the rows that are left
    List<int32_t> next_offsets_;
    int* original_;             // the token each row is
    int* firsts_;               // [sequences]: the first token of each, which never leaves
    int* places_ = nullptr;     // and where in the text each row's token stands
    float* angles_ = nullptr;   // [rotations, tokens, head size]
    List<int> kept_, dropped_;  // rows by the layer's decision
    List<int> left_;            // the tokens of `dropped_`
    List<Summary> summaries_;
    List<int> summary_of_kept_;                 // for each of `kept_`, the summary its row carries, or -1
    List<int> summary_of_dropped_;              // for each of `dropped_`, the summary it goes to,
    List<float> shares_;                        // and its share there
    float *gone_ = nullptr, *means_ = nullptr;  // states of `dropped_`; what they add to each summary
    bool gather_ = false;                       // whether rows are taken by `kept_`
    List<Range> sequence_chunks_, row_chunks_, dropped_chunks_;

    const ContextMaps* context_maps_ = nullptr;
    List<int> others_;  // context tokens, in their order
    List<int32_t> other_offsets_, key_offsets_;
    List<int> key_rows_;  // of a key, its row, or ~ its number among `others_`
    int *key_places_ = nullptr, *key_of_row_ = nullptr;
    uint8_t* is_context_ = nullptr;  // [tokens]
    float* codes_ = nullptr;         // [tokens, rank]

    Barrier barrier_;
    std::atomic<size_t> next_{0};
};

namespace {

void require(bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
}

// What is cheap to check about a request before anything of it is read or measured.
void check_sizes(const Encoder& encoder, const Request& r) {
    require(r.sequences > 0 && r.tokens > 0 && r.cu_seqlens && r.cu_seqlens[0] == 0, "cu_seqlens must begin with 0");
    for (int s = 0; s < r.sequences; s++) require(r.cu_seqlens[s + 1] > r.cu_seqlens[s], "cu_seqlens must rise");
    require(r.cu_seqlens[r.sequences] == r.tokens, "cu_seqlens must end with the number of tokens");
    require(r.layers == encoder.shape.layers, "the request is for another number of layers");
    require(encoder.complete(), "the encoder lacks weights");
}

void check_contents(const Encoder& encoder, const Request& r) {
    const Embeddings& e = encoder.embeddings;
    require(r.ids && r.positions && r.out && r.survived, "a tensor is missing");
    require((!r.thresholds && !r.keep) || r.prunes, "prunes is missing");
    require(!r.keep == !r.importance, "keep and importance go together");
    require(!r.probes == !r.probed, "probes and probed go together");
    require(!r.hosts || !r.probes, "summaries and probes exclude each other");
    if (r.context) {
        const ContextMaps& c = *r.context;
        bool own = c.up.size() == encoder.layers.size() && &c.kernels == &encoder.kernels;
        for (const Linear& down : c.down) own &= !down.weight || down.in == encoder.shape.hidden;
        for (const Linear& up : c.up) own &= up.weight && up.out == 2 * encoder.shape.key_size();
        require(own, "context of another encoder");
    }
    require(!r.context || !r.hosts, "summaries and context exclude each other");
    require(!r.outside || (r.context && r.context->down[0].weight), "tokens outside are context");
    for (int s = 0; r.outside && s < r.sequences; s++)
        require(!r.outside[r.cu_seqlens[s]], "no sequence's first token can be outside");
    for (int i = 0; r.outside && i < r.tokens; i++)
        require(r.outside[i] <= 1 && r.survived[i] == -r.outside[i], "outside must be 0 or 1, as survived says");
    for (int s = 0; r.asks && s < r.sequences; s++)
        for (int i = r.cu_seqlens[s], runs = 0; i < r.cu_seqlens[s + 1]; i++) {
            runs += r.asks[i] && (i == r.cu_seqlens[s] || !r.asks[i - 1]);
            require(runs < 2, "the asking tokens of a sequence must be next to each other");
        }
    bool placed = encoder.bias.table.empty() && encoder.distances.columns.empty();
    for (const Step& step : encoder.steps) placed &= step.window < 0;
    require(placed || r.places, "places are missing");
    for (int s = 0; r.places && s < r.sequences; s++)
        for (int i = r.cu_seqlens[s] + 1; i < r.cu_seqlens[s + 1]; i++)
            require(r.places[i] > r.places[i - 1], "places must rise within a sequence");
    for (int i = 0; i < r.tokens; i++) {
        require(r.ids[i] >= 0 && r.ids[i] < e.words &&
                    (!e.position || (r.positions[i] >= 0 && r.positions[i] < e.positions)) &&
                    (!r.types || !e.type || (r.types[i] >= 0 && r.types[i] < e.types)),
                "an id, position or token type is outside its table");
        require(!r.hosts || !r.segments || r.segments[i] < 2, "segments must be 0 or 1");
        require(!r.hosts || r.hosts[i] == 0, "hosts must be zero at first");
    }
}

}  // namespace

bool Encoder::complete() const {
    auto fits = [](const Norm& norm, int size) { return norm.gamma.empty() || (int)norm.gamma.size() == size; };
    bool all =
        embeddings.word && fits(embeddings.norm, embeddings.size) && fits(embeddings.projected_norm, shape.hidden) &&
        fits(last_norm, shape.hidden) &&
        (embeddings.projection.weight ? embeddings.projection.in == embeddings.size : embeddings.size == shape.hidden);
    for (const Step& step : steps) {
        const Layer& l = layers[step.weights];
        all &= l.query.weight && l.key.weight && l.value.weight && l.output.weight && l.up.weight && l.down.weight &&
               (!shape.gated || l.gate.weight) && (shape.norm_first || !l.attention_norm.gamma.empty()) &&
               !l.output_norm.gamma.empty() && step.rotation < (int)rotations.size();
        for (const auto* by : {&l.distance.of_queries, &l.distance.of_keys})
            for (const Linear& linear : *by) all &= !distances.columns.empty() && linear.out == distances.count();
    }
    for (const Rotation& rotation : rotations) all &= 2 * (int)rotation.frequencies.size() == shape.head_size;
    return all;
}

void Encoder::set_bias(const float* table, int far) {
    const int wide = far + BIAS_EDGE;
    bias.far = wide;
    bias.table.clear();
    for (int head = 0; head < shape.heads; head++)
        for (int i = -wide; i <= wide; i++)
            bias.table.push_back(table[head * (2 * far + 1) + far + std::max(-far, std::min(i, far))]);
}

void Encoder::set_distances(const int32_t* columns, int far) {
    distances = {{columns, columns + 2 * far + 1}, far};
    distances.columns.resize(2 * far + 1 + DISTANCE_EDGE, columns[2 * far]);
}

size_t Encoder::workspace_bytes(const Request& request) const {
    check_sizes(*this, request);
    Arena measure{nullptr};
    measure.take<Pass>(1);
    Pass(*this, request).lay_out(measure);
    return measure.used;
}

bool Encoder::forward(Request& request) const {
    static_assert(std::is_trivially_destructible<Pass>::value, "a pass is left as it is when its caller gives up");
    require(request.workspace && (size_t)request.workspace % 64 == 0, "the workspace must be aligned to 64 bytes");
    Pass* pass = (Pass*)request.workspace;
    if (request.waiting) {
        for (int i = 0; i < request.rows; i++) require(request.keep[i] <= 1, "keep must be 0 or 1 for every row");
    } else {
        require(request.workspace_bytes >= workspace_bytes(request), "the workspace is too small");
        check_contents(*this, request);
        Arena arena{request.workspace};
        pass = new (arena.take<Pass>(1)) Pass(*this, request);
        pass->lay_out(arena);
    }
    return pass->run(request);
}

void apply_linear(const Kernels& kernels, const Linear& linear, const float* x, int rows, float* out, int threads) {
    if (rows < 1) return;
    threads = std::max(1, std::min({threads, usable_cores(), panels(kernels, linear)}));
    const int most = std::min(kernels.chunk_rows, rows);
    struct Space {
        char *packed, *scratch;
        float* scale;
    };
    auto lay_out = [&](Arena& arena, int wanted) {
        Space space{};
        for (int rank = 0; rank <= wanted; rank++)
            space = {arena.take<char>(kernels.packed_rows_bytes(most, linear.in)),
                     arena.take<char>(kernels.product_scratch(most, linear.in, linear.out)), arena.take<float>(most)};
        return space;
    };
    Arena measure{nullptr};
    lay_out(measure, threads - 1);
    const Buffer buffer(measure.used);  // before there is a team: a thread must not fail alone
    auto work = [&](int rank, int count) {
        // Threads take columns: rows may be few, and every thread packs them for itself.
        const Range part = share(panels(kernels, linear), rank, count);
        if (part.size() == 0) return;
        Arena arena{buffer.data()};
        const Space space = lay_out(arena, rank);
        kernels.enter();
        for (int begin = 0; begin < rows; begin += kernels.chunk_rows) {
            const int here = std::min(kernels.chunk_rows, rows - begin);
            kernels.pack_rows(x + (size_t)begin * linear.in, false, linear.in, nullptr, 0, here, here, linear.in,
                              space.packed, space.scale);
            kernels.multiply({&linear, space.packed, space.scale, here, part.begin, part.end, Epilogue::store_float,
                              Activation::gelu, out + (size_t)begin * linear.out, (size_t)linear.out, nullptr, nullptr,
                              space.scratch});
        }
        kernels.leave();
    };
    auto nothing = [](int, int) {};
    run_on_team(threads, nothing, work);
}

}  // namespace tp
