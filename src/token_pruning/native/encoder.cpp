#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace tp {

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

Buffer::Buffer(size_t bytes) {
    // Huge pages: without them reading the weights waits for address translation as much as for memory.
    const size_t page = bytes >= (1u << 20) ? 2u << 20 : 64;
    bytes_ = round_up(std::max<size_t>(bytes, 1), page);
    data_ = (char*)std::aligned_alloc(page, bytes_);
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (page > 64) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}
Buffer::~Buffer() { std::free(data_); }
Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
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

Linear pack_linear(const Kernels& kernels, Slabs& slabs, const float* weight, const float* bias, int in, int out) {
    void* packed = slabs.take(kernels.weight_bytes(in, out));
    const size_t padded = round_up(out, 64);  // kernels read whole panels
    float* values = (float*)slabs.take(padded * sizeof(float));
    float* scale = kernels.quantized ? (float*)slabs.take(padded * sizeof(float)) : nullptr;
    for (size_t i = 0; i < padded; i++) {
        values[i] = bias && (int)i < out ? bias[i] : 0.0f;
        if (scale) scale[i] = 0.0f;
    }
    kernels.pack_weight(weight, in, out, packed, scale);
    return {in, out, packed, values, scale};
}

Buffer Encoder::borrow(size_t bytes) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        auto best =
            std::find_if(workspaces_.begin(), workspaces_.end(), [&](const Buffer& b) { return b.bytes() >= bytes; });
        if (best == workspaces_.end() && !workspaces_.empty()) best = workspaces_.begin();
        if (best != workspaces_.end()) {
            Buffer found = std::move(*best);
            workspaces_.erase(best);
            if (found.bytes() >= bytes) return found;
        }  // one that is too small is freed, so there are never more than calls at once
    }
    return Buffer(bytes);
}

void Encoder::give_back(Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    workspaces_.push_back(std::move(buffer));
}

namespace {

// Hands out parts of a workspace; with a null base it measures.
struct Arena {
    char* base;
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        char* p = base + used;
        used += round_up(count * sizeof(T), 64) + 64;
        return (T*)p;
    }
};

// What a team needs for the chunk of rows it works on.
struct ChunkSpace {
    char* packed;            // rows of the hidden size, packed
    char* packed_inner;      // rows of the feed-forward's inner size, packed
    char* inner;             // the same before quantisation
    char* projected;         // queries, keys and values, exchange type [rows, 3 · hidden]
    char* first_queries;     // exchange type [sequences, hidden]
    float *sums, *attended;  // [rows, hidden]
    float* received;         // [heads, rows]
    float* row_scale;        // [rows]
};

struct ThreadSpace {
    char* product;
    char* attention;
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
    Pass(Encoder& encoder, const Request& request)
        : encoder_(encoder),
          kernels_(encoder.kernels),
          shape_(encoder.shape),
          request_(request),
          tokens_(request.cu_seqlens[request.sequences]) {
        for (int s = 0; s < request.sequences; s++)
            longest_ = std::max(longest_, request.cu_seqlens[s + 1] - request.cu_seqlens[s]);
        chunk_rows_ = (int)round_up(std::min(tokens_, std::max(kernels_.chunk_rows, longest_)), 32);
    }

    int run() {
        const int asked = std::max(1, request_.threads);
        Arena measure{nullptr};
        lay_out(measure, asked);
        Buffer workspace = encoder_.borrow(measure.used);
        Arena arena{workspace.data()};
        lay_out(arena, asked);
        offsets_.assign(request_.cu_seqlens, request_.cu_seqlens + request_.sequences + 1);
        original_.resize(tokens_);
        for (int i = 0; i < tokens_; i++) original_[i] = i;
        // Nothing is allocated from here on: no thread may fail while others wait for it.
        kept_.reserve(tokens_), dropped_.reserve(tokens_), left_.reserve(tokens_), keep_.resize(tokens_);
        if (request_.hosts) {
            summaries_.assign(SEGMENTS * request_.sequences, Summary());
            summary_of_kept_.reserve(tokens_), summary_of_dropped_.reserve(tokens_), shares_.reserve(tokens_);
        }
        next_offsets_.reserve(offsets_.size()), sequence_chunks_.reserve(request_.sequences);
        row_chunks_.reserve(tokens_ / 32 + asked + 1), dropped_chunks_.reserve(tokens_ / 32 + asked + 1);
        run_on_team(asked, [&](int rank, int threads) {
            if (rank == 0) begin(threads);
            while (!started_.load(std::memory_order_acquire)) std::this_thread::yield();
            kernels_.enter();
            work(rank, threads);
            kernels_.leave();
        });
        encoder_.give_back(std::move(workspace));
        return stopped_;
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
            : seconds_(pass.request_.seconds && team.timed ? pass.request_.seconds + part : nullptr) {
            if (seconds_) start_ = std::chrono::steady_clock::now();
        }
        ~Clock() {
            if (seconds_) *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
        }
        double* seconds_;
        std::chrono::steady_clock::time_point start_;
    };

    void lay_out(Arena& arena, int threads) {
        const size_t hidden = shape_.hidden, inner = shape_.inner, rows = chunk_rows_, wide = kernels_.half ? 2 : 4;
        states_[0] = arena.take<float>(tokens_ * hidden);
        states_[1] = arena.take<float>(tokens_ * hidden);
        context_ = arena.take<char>(tokens_ * hidden * wide);
        received_ = arena.take<float>(tokens_);
        if (request_.hosts) {
            gone_ = arena.take<float>(tokens_ * hidden);
            means_ = arena.take<float>((size_t)SEGMENTS * request_.sequences * hidden);
        }
        const size_t widest = std::max<size_t>(hidden, encoder_.embeddings.size);
        chunks_.resize(threads), scratch_.resize(threads);
        for (int t = 0; t < threads; t++) {
            ChunkSpace& c = chunks_[t];
            c.packed = arena.take<char>(kernels_.packed_rows_bytes(rows, widest));
            c.packed_inner = arena.take<char>(kernels_.packed_rows_bytes(rows, inner));
            c.inner = arena.take<char>(kernels_.quantized ? rows * inner * wide : 0);
            c.projected = arena.take<char>(rows * 3 * hidden * wide);
            c.first_queries = arena.take<char>(rows * hidden * wide);
            c.sums = arena.take<float>(rows * hidden);
            c.attended = arena.take<float>(rows * widest);
            c.received = arena.take<float>(rows * shape_.heads);
            c.row_scale = arena.take<float>(rows);
            scratch_[t].product = arena.take<char>(
                std::max(kernels_.product_scratch(rows, inner, hidden), kernels_.product_scratch(rows, widest, inner)));
            scratch_[t].attention = arena.take<char>(kernels_.attention_scratch(longest_, shape_.head_size()));
        }
    }

    void begin(int threads) {
        barrier_.expect(threads);
        plan(threads);
        started_.store(true, std::memory_order_release);
    }

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
        take(team, row_chunks_, [&](Range r) { embed(team, r); });
        restart(rank);
        for (int layer = 0; layer < shape_.layers; layer++) {
            take(team, sequence_chunks_,
                 [&](Range r) { first_rows_only(layer) ? attend_first(team, layer, r) : attend(team, layer, r); });
            barrier_.wait();
            if (rank == 0) {
                Clock clock(*this, team, DECIDE);
                decide(layer, threads);
            }
            barrier_.wait();
            if (stopped_) return;
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
    void take(const Team& team, const std::vector<Range>& chunks, Function function) {
        if (together_) {
            for (Range chunk : chunks) function(chunk), team.wait();
        } else {
            for (size_t i; (i = next_.fetch_add(1)) < chunks.size();) function(chunks[i]);
        }
    }

    bool first_rows_only(int layer) const { return request_.first_only && layer + 1 == shape_.layers; }

    // Groups of whole sequences, as even as their lengths allow.
    void plan_sequences(int threads) {
        sequence_chunks_.clear();
        const int rows = offsets_.back();
        const int groups = chunk_count(threads, rows);
        const int target = std::max(1, (rows + groups - 1) / groups);
        for (int s = 0; s < request_.sequences;) {
            int end = s + 1;
            while (end < request_.sequences && offsets_[end + 1] - offsets_[s] <= chunk_rows_ &&
                   offsets_[end] - offsets_[s] + (offsets_[end + 1] - offsets_[end]) / 2 < target)
                end++;
            sequence_chunks_.push_back({s, end});
            s = end;
        }
        // The longest first, so that the threads end together.
        if (!together_)
            std::stable_sort(sequence_chunks_.begin(), sequence_chunks_.end(), [&](Range a, Range b) {
                return offsets_[a.end] - offsets_[a.begin] > offsets_[b.end] - offsets_[b.begin];
            });
    }

    int chunk_count(int threads, int rows) const {
        int count = std::max(1, (rows + kernels_.chunk_rows - 1) / kernels_.chunk_rows);
        return together_ ? count : (int)round_up(count, threads);
    }

    void plan_rows(int threads, int rows, std::vector<Range>& chunks) const {
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

    void normalize(const Team& team, const float* in, float* out, int rows, int width, const Norm& norm) {
        Clock clock(*this, team, NORM);
        Range part = share(rows, team.rank, team.threads, 16);
        kernels_.normalize(in, out, part.begin, part.end, width, norm.gamma.data(), norm.beta.data(), shape_.epsilon);
    }

    // Token states from the tables, and their projection where the tables have another width.
    void embed(const Team& team, Range chunk) {
        const Embeddings& e = encoder_.embeddings;
        const bool project = e.size != shape_.hidden;
        const size_t row = (size_t)e.size * (encoder_.half_tables ? 2 : 4);
        float* out = states_[0] + (size_t)chunk.begin * shape_.hidden;
        float* rows = project ? team.chunk->attended : out;
        {
            Clock clock(*this, team, EMBED);
            const Range part = share(chunk.size(), team.rank, team.threads, 16);
            for (int i = part.begin; i < part.end; i++) {
                const int t = chunk.begin + i;
                kernels_.embed(e.word + request_.ids[t] * row, e.position + request_.positions[t] * row,
                               e.types ? e.type + (request_.types ? request_.types[t] : 0) * row : nullptr,
                               encoder_.half_tables, e.size, rows + (size_t)i * e.size);
            }
            kernels_.normalize(rows, rows, part.begin, part.end, e.size, e.norm.gamma.data(), e.norm.beta.data(),
                               shape_.epsilon);
        }
        if (!project) return;
        pack(team, rows, false, e.size, nullptr, chunk.size(), e.size, team.chunk->packed);
        team.wait();
        multiply(team, EMBED, e.projection, team.chunk->packed, chunk.size(), Epilogue::store_float, out,
                 shape_.hidden);
    }

    char* projected(const Team& team, int row, int column) const {
        return team.chunk->projected + ((size_t)row * 3 * shape_.hidden + column) * exchange();
    }
    char* context(int row, int column) const { return context_ + ((size_t)row * shape_.hidden + column) * exchange(); }
    size_t exchange() const { return kernels_.half ? 2 : 4; }

    void project(const Team& team, const Linear& linear, int rows, int column) {
        multiply(team, PROJECT, linear, team.chunk->packed, rows, Epilogue::store, projected(team, 0, column),
                 3 * shape_.hidden);
    }

    // Attention of whole sequences: contexts, and what each token received where the layer prunes.
    void attend(const Team& team, int layer, Range sequences) {
        const Layer& l = encoder_.layers[layer];
        const int first = offsets_[sequences.begin], rows = offsets_[sequences.end] - first, hidden = shape_.hidden;
        pack(team, states_[0] + (size_t)first * hidden, false, hidden, nullptr, rows, hidden, team.chunk->packed);
        team.wait();
        project(team, l.query, rows, 0);
        project(team, l.key, rows, hidden);
        project(team, l.value, rows, 2 * hidden);
        team.wait();
        Clock clock(*this, team, ATTEND);
        const bool receive = decides(layer);
        const int size = shape_.head_size(), heads = shape_.heads;
        const Range items = share(sequences.size() * heads, team.rank, team.threads);
        for (int item = items.begin; item < items.end; item++) {
            const int s = sequences.begin + item / heads, head = item % heads, at = offsets_[s] - first,
                      count = offsets_[s + 1] - offsets_[s];
            kernels_.attend({projected(team, at, head * size), projected(team, at, hidden + head * size),
                             projected(team, at, 2 * hidden + head * size), (size_t)3 * hidden, (size_t)3 * hidden,
                             count, count, size, 1.0f / std::sqrt((float)size), context(offsets_[s], head * size),
                             (size_t)hidden, receive ? team.chunk->received + (size_t)head * rows + at : nullptr,
                             team.scratch->attention});
        }
        if (!receive) return;
        team.wait();
        // Heads are added in order whatever thread computed them.
        const Range part = share(rows, team.rank, team.threads, 16);
        float* total = received_ + first;
        for (int i = part.begin; i < part.end; i++) total[i] = 0;
        for (int head = 0; head < heads; head++)
            for (int i = part.begin; i < part.end; i++) total[i] += team.chunk->received[(size_t)head * rows + i];
        for (int i = part.begin; i < part.end; i++) total[i] /= (float)heads;
    }

    // The last layer where only first tokens are wanted: keys and values of every token, one query per sequence.
    void attend_first(const Team& team, int layer, Range sequences) {
        if (decides(layer)) {  // only to record what would be removed
            attend(team, layer, sequences);
            team.wait();
        }
        const Layer& l = encoder_.layers[layer];
        const int first = offsets_[sequences.begin], rows = offsets_[sequences.end] - first, hidden = shape_.hidden;
        pack(team, states_[0] + (size_t)first * hidden, false, hidden, nullptr, rows, hidden, team.chunk->packed);
        team.wait();
        project(team, l.key, rows, hidden);
        project(team, l.value, rows, 2 * hidden);
        team.wait();
        pack(team, states_[0], false, hidden, offsets_.data() + sequences.begin, sequences.size(), hidden,
             team.chunk->packed);
        team.wait();
        multiply(team, PROJECT, l.query, team.chunk->packed, sequences.size(), Epilogue::store,
                 team.chunk->first_queries, hidden);
        team.wait();
        Clock clock(*this, team, ATTEND);
        const int size = shape_.head_size(), heads = shape_.heads;
        const Range items = share(sequences.size() * heads, team.rank, team.threads);
        for (int item = items.begin; item < items.end; item++) {
            const int s = sequences.begin + item / heads, head = item % heads, at = offsets_[s] - first,
                      count = offsets_[s + 1] - offsets_[s];
            kernels_.attend(
                {team.chunk->first_queries + ((size_t)(s - sequences.begin) * hidden + head * size) * exchange(),
                 projected(team, at, hidden + head * size), projected(team, at, 2 * hidden + head * size),
                 (size_t)hidden, (size_t)3 * hidden, 1, count, size, 1.0f / std::sqrt((float)size),
                 context(offsets_[s], head * size), (size_t)hidden, nullptr, team.scratch->attention});
        }
    }

    // Output projection, residual and LayerNorm of the given rows, into the chunk's `attended`.
    void finish_attention(const Team& team, const Layer& l, const int* index, int begin, int rows) {
        const int hidden = shape_.hidden;
        ChunkSpace& c = *team.chunk;
        pack(team, index ? context_ : context(begin, 0), kernels_.half, hidden, index, rows, hidden, c.packed);
        team.wait();
        multiply(team, OUTPUT, l.output, c.packed, rows, Epilogue::residual, c.sums, hidden,
                 index ? states_[0] : states_[0] + (size_t)begin * hidden, index);
        team.wait();
        normalize(team, c.sums, c.attended, rows, hidden, l.attention_norm);
    }

    // Tokens that leave after this layer's attention: their last state is that of the attention block.
    void leave(const Team& team, int layer, Range r) {
        finish_attention(team, encoder_.layers[layer], dropped_.data() + r.begin, 0, r.size());
        const Range part = share(r.size(), team.rank, team.threads, 16);
        for (int i = part.begin; i < part.end; i++) {
            const float* state = team.chunk->attended + (size_t)i * shape_.hidden;
            const size_t bytes = shape_.hidden * sizeof(float);
            if (!request_.first_only) memcpy(request_.out + (size_t)left_[r.begin + i] * shape_.hidden, state, bytes);
            if (summarizes(layer)) memcpy(gone_ + (size_t)(r.begin + i) * shape_.hidden, state, bytes);
        }
    }

    // What this layer's dropped tokens add to their summaries, by importance.
    void average_dropped() {
        const size_t hidden = shape_.hidden;
        for (size_t i = 0; i < summaries_.size(); i++)
            if (summaries_[i].gathered > 0) std::fill_n(means_ + i * hidden, hidden, 0.0f);
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
        const Layer& l = encoder_.layers[layer];
        const int rows = r.size(), hidden = shape_.hidden, inner = shape_.inner;
        ChunkSpace& c = *team.chunk;
        finish_attention(team, l, gather_ ? kept_.data() + r.begin : nullptr, r.begin, rows);
        if (gather_ && summarizes(layer))
            merge_summaries(c.attended, r.begin, share(rows, team.rank, team.threads, 16));
        pack(team, c.attended, false, hidden, nullptr, rows, hidden, c.packed);
        team.wait();
        if (kernels_.quantized) {
            multiply(team, UP, l.up, c.packed, rows, Epilogue::activate_store, c.inner, inner);
            team.wait();
            pack(team, c.inner, kernels_.half, inner, nullptr, rows, inner, c.packed_inner);
        } else {
            multiply(team, UP, l.up, c.packed, rows, Epilogue::activate_pack, c.packed_inner, inner);
        }
        team.wait();
        multiply(team, DOWN, l.down, c.packed_inner, rows, Epilogue::residual, c.sums, hidden, c.attended);
        team.wait();
        normalize(team, c.sums, states_[1] + (size_t)r.begin * hidden, rows, hidden, l.output_norm);
    }

    // Whether decisions are taken in this layer.
    bool decides(int layer) const {
        if (!request_.thresholds && !request_.decide) return false;
        return request_.prunes[layer] && (request_.record || !first_rows_only(layer));
    }

    bool summarizes(int layer) const { return request_.hosts && layer + 1 < shape_.layers; }
    bool is_summary(int row) const { return request_.hosts && request_.hosts[original_[row]]; }

    // The summary that a row goes to, or is.
    int summary_of(int sequence, int row) const {
        return SEGMENTS * sequence + (request_.segments ? request_.segments[original_[row]] : 0);
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
        request_.hosts[original_[row]] = 1;
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

    void decide(int layer, int threads) {
        next_.store(0);
        const int rows = offsets_.back();
        kept_.clear(), dropped_.clear(), left_.clear(), dropped_chunks_.clear();
        gather_ = false;
        if (!decides(layer)) {
            for (int i = 0; i < rows; i++)
                if (!is_summary(i)) request_.survived[original_[i]]++;
        } else {
            if (request_.received)
                for (int i = 0; i < rows; i++) request_.received[(size_t)layer * tokens_ + original_[i]] = received_[i];
            if (request_.decide) {
                stopped_ = request_.decide(layer, rows, offsets_.data(), received_, keep_.data());
                if (stopped_) return;
            }
            next_offsets_.assign(1, 0);
            summary_of_kept_.clear(), summary_of_dropped_.clear(), shares_.clear();
            for (Summary& s : summaries_) s.gathered = 0;
            for (int s = 0; s < request_.sequences; s++) {
                const int count = offsets_[s + 1] - offsets_[s];
                const float divisor = request_.divisor > 0 ? request_.divisor : (float)count;
                for (int i = offsets_[s]; i < offsets_[s + 1]; i++) {
                    const bool keep =
                        request_.decide ? keep_[i] != 0 : received_[i] / divisor >= request_.thresholds[layer];
                    const bool summary = is_summary(i);
                    if (i == offsets_[s] || keep || summary) {
                        kept_.push_back(i);
                        if (request_.hosts) summary_of_kept_.push_back(summary ? summary_of(s, i) : -1);
                        if (!summary) request_.survived[original_[i]]++;
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
                offsets_.swap(next_offsets_);
            }
        }
        if (first_rows_only(layer)) {
            kept_.clear();
            kept_.assign(offsets_.begin(), offsets_.end() - 1);
            gather_ = true;
            plan_rows(threads, (int)kept_.size(), row_chunks_);
            return;
        }
        plan(threads);
        if (!request_.first_only || summarizes(layer)) plan_rows(threads, (int)dropped_.size(), dropped_chunks_);
    }

    // After the last layer: what is wanted of the states that are left.
    void finish() {
        const size_t hidden = shape_.hidden;
        if (!request_.first_only) {
            for (int i = 0; i < offsets_.back(); i++)
                if (!is_summary(i))
                    memcpy(request_.out + original_[i] * hidden, states_[0] + i * hidden, hidden * sizeof(float));
            return;
        }
        memcpy(request_.out, states_[0], request_.sequences * hidden * sizeof(float));
    }

    static constexpr int MIN_ROWS_APART = 96;
    static constexpr int SEGMENTS = 2;               // summary tokens a sequence can have
    static constexpr float SMALLEST_WEIGHT = 1e-6f;  // attention received can underflow to 0

    Encoder& encoder_;
    const Kernels& kernels_;
    const Shape shape_;
    const Request& request_;
    const int tokens_;
    int longest_ = 0, chunk_rows_ = 0;
    bool together_ = false;

    float* states_[2];  // rows that entered the layer, rows that leave it
    char* context_;
    float* received_;
    std::vector<ChunkSpace> chunks_;
    std::vector<ThreadSpace> scratch_;

    std::vector<int32_t> offsets_;  // cu_seqlens of the rows that are left
    std::vector<int32_t> next_offsets_;
    std::vector<int> original_;        // the token each row is
    std::vector<int> kept_, dropped_;  // rows by the layer's decision
    std::vector<int> left_;            // the tokens of `dropped_`
    std::vector<uint8_t> keep_;
    std::vector<Summary> summaries_;
    std::vector<int> summary_of_kept_;          // for each of `kept_`, the summary its row carries, or -1
    std::vector<int> summary_of_dropped_;       // for each of `dropped_`, the summary it goes to,
    std::vector<float> shares_;                 // and its share there
    float *gone_ = nullptr, *means_ = nullptr;  // states of `dropped_`; what they add to each summary
    bool gather_ = false;                       // whether rows are taken by `kept_`
    std::vector<Range> sequence_chunks_, row_chunks_, dropped_chunks_;

    Barrier barrier_;
    std::atomic<bool> started_{false};
    std::atomic<size_t> next_{0};
    int stopped_ = 0;
};

int Encoder::forward(const Request& request) { return Pass(*this, request).run(); }

void apply_linear(const Kernels& kernels, const Linear& linear, const float* x, int rows, float* out, int threads) {
    run_on_team(threads, [&](int rank, int count) {
        // Threads take columns: rows may be few, and every thread packs them for itself.
        const Range part = share(panels(kernels, linear), rank, count);
        if (part.size() == 0) return;
        kernels.enter();
        for (int begin = 0; begin < rows; begin += kernels.chunk_rows) {
            const int here = std::min(kernels.chunk_rows, rows - begin);
            Buffer packed(kernels.packed_rows_bytes(here, linear.in)),
                scratch(kernels.product_scratch(here, linear.in, linear.out)), scale(here * sizeof(float));
            kernels.pack_rows(x + (size_t)begin * linear.in, false, linear.in, nullptr, 0, here, here, linear.in,
                              packed.data(), (float*)scale.data());
            kernels.multiply({&linear, packed.data(), (float*)scale.data(), here, part.begin, part.end,
                              Epilogue::store_float, Activation::gelu, out + (size_t)begin * linear.out,
                              (size_t)linear.out, nullptr, nullptr, scratch.data()});
        }
        kernels.leave();
    });
}

}  // namespace tp
