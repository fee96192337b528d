#include "threads.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#include <pthread.h>

namespace tp {
namespace {

constexpr int SPINS = 4000;  // some tens of microseconds

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

class Pool {
public:
    std::mutex in_use;

    void run(int threads, const std::function<void(int, int)>& work) {
        while ((int)workers_.size() < threads - 1) {
            int rank = (int)workers_.size() + 1;
            workers_.emplace_back([this, rank, seen = round_.load()]() mutable { serve(rank, seen); });
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            threads_ = threads;
            running_.store((int)workers_.size());
            round_.fetch_add(1);
        }
        wake_.notify_all();
        work(0, threads);
        for (int spins = 0; running_.load(std::memory_order_acquire) > 0; spins++)
            spins < SPINS ? relax() : std::this_thread::yield();
    }

private:
    void serve(int rank, unsigned seen) {
        for (;;) {
            for (int spins = 0; spins < SPINS && round_.load(std::memory_order_acquire) == seen; spins++) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_.load() != seen; });
                seen = round_.load();
            }
            if (rank < threads_) (*work_)(rank, threads_);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    const std::function<void(int, int)>* work_ = nullptr;
    int threads_ = 0;
    std::atomic<int> running_{0};
    std::atomic<unsigned> round_{0};
};

// Never destroyed: its threads end with the process. A forked child has none of them, and starts a pool of its own.
Pool* pool = nullptr;
std::once_flag pool_made;

Pool& the_pool() {
    std::call_once(pool_made, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    return *pool;
}

}  // namespace

void Barrier::wait() {
    if (threads_ == 1) return;
    unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
        spins < SPINS ? relax() : std::this_thread::yield();
}

void run_on_team(int threads, const std::function<void(int, int)>& work) {
    if (threads > 1) {
        Pool& pool = the_pool();
        std::unique_lock<std::mutex> lock(pool.in_use, std::try_to_lock);
        if (lock.owns_lock()) return pool.run(threads, work);
    }
    work(0, 1);
}

}  // namespace tp
