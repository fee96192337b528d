#include "threads.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace tp {
namespace {

constexpr int SPINS = 4000;  // some tens of microseconds
constexpr int MOST_THREADS = 256;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // takes about as long as x86's pause; `yield` does nothing on most processors
#endif
}

class Pool {
public:
    std::mutex in_use;

    // Starts what threads are missing; returns how many there are, the caller's included.
    int prepare(int threads) {
        threads = std::min(threads, MOST_THREADS);
        while (ready_ < threads && start(ready_)) ready_++;
        return std::min(threads, ready_);
    }

    void run(int threads, Work work) {
        work_ = &work, threads_ = threads, thrown_ = nullptr;
        running_.store(threads - 1, std::memory_order_relaxed);
        const unsigned before = done_.now();
        for (int rank = 1; rank < threads; rank++) seats_[rank].called.raise();
        attempt(0);
        if (threads > 1) done_.wait(before);
        if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
    }

private:
    // Each on cache lines of its own: only those who are called look.
    struct alignas(64) Seat {
        Pool* pool;
        int rank;
        Signal called;
    };

    bool start(int rank) {
        Seat& seat = seats_[rank];
        seat.pool = this, seat.rank = rank;
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes)) return false;
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        // Signals are the business of the threads that were there before.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_t thread;
        const bool started = pthread_create(
                                 &thread, &attributes,
                                 [](void* seat) -> void* {
                                     ((Seat*)seat)->pool->serve(*(Seat*)seat);
                                     return nullptr;
                                 },
                                 &seat) == 0;
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
        return started;
    }

    void serve(Seat& seat) {
        for (unsigned seen = 0;; seen++) {  // nobody calls again before all have answered
            seat.called.wait(seen);
            attempt(seat.rank);
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.raise();
        }
    }

    void attempt(int rank) {
        try {
            (*work_)(rank, threads_);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!thrown_) thrown_ = std::current_exception();
        }
    }

    int ready_ = 1;
    Seat seats_[MOST_THREADS];
    const Work* work_ = nullptr;
    int threads_ = 0;
    std::atomic<int> running_{0};
    Signal done_;
    std::mutex mutex_;
    std::exception_ptr thrown_;
};

// Never destroyed: its threads end with the process. A forked child has none of them, and whoever held the pool's locks
// is not there either, so the child makes a pool anew in the same place.
alignas(Pool) char pool_place[sizeof(Pool)];
Pool& the_pool() { return *(Pool*)pool_place; }
void make_pool() { new (pool_place) Pool; }
__attribute__((constructor)) void make_first_pool() {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
}

// The beginning of a small file as text, empty where there is none. Allocates nothing.
void read_text(const char* path, char* text, size_t size) {
    text[0] = 0;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    const ssize_t count = read(file, text, size - 1);
    text[count > 0 ? count : 0] = 0;
    close(file);
}

// Cores that a group's files allow, rounded up; 0: no limit.
long group_cores(int version, const char* folder) {
    char path[4352], text[64];
    long long quota = -1, period = 0;
    if (version == 2) {
        std::snprintf(path, sizeof path, "%s/cpu.max", folder);
        read_text(path, text, sizeof text);
        if (std::sscanf(text, "%lld %lld", &quota, &period) != 2) return 0;  // "max 100000"
    } else {
        std::snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
        read_text(path, text, sizeof text);
        if (std::sscanf(text, "%lld", &quota) != 1) return 0;
        std::snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        read_text(path, text, sizeof text);
        if (std::sscanf(text, "%lld", &period) != 1) return 0;
    }
    return quota > 0 && period > 0 ? (long)std::min<long long>((quota + period - 1) / period, INT_MAX) : 0;
}

// The tightest quota of this process's group and those above it; INT_MAX where there is none.
int quota_cores() {
    char groups[8192], folder[4224];
    read_text("/proc/self/cgroup", groups, sizeof groups);
    long least = INT_MAX;
    for (char *line = groups, *next; line && *line; line = next) {
        next = std::strchr(line, '\n');
        if (next) *next++ = 0;
        char* controllers = std::strchr(line, ':');  // "0::/path", or "4:cpu,cpuacct:/path"
        char* path = controllers ? std::strchr(controllers + 1, ':') : nullptr;
        if (!path) continue;
        *path++ = 0, controllers++;
        const int version = *controllers ? 1 : 2;
        bool about_cores = version == 2;
        char* rest = nullptr;
        for (char* name = strtok_r(controllers, ",", &rest); name; name = strtok_r(nullptr, ",", &rest))
            about_cores |= std::strcmp(name, "cpu") == 0;
        if (!about_cores) continue;
        // In a container the path may be that of the host, and the mounted root is the group itself.
        for (size_t length = std::strlen(path);; length--) {
            while (length > 0 && length < std::strlen(path) && path[length] != '/') length--;
            for (const char* root : {"/sys/fs/cgroup", "/sys/fs/cgroup/cpu"}) {
                std::snprintf(folder, sizeof folder, "%s%.*s", root, (int)std::min<size_t>(length, 4096), path);
                const long cores = group_cores(version, folder);
                if (cores) least = std::min(least, cores);
            }
            if (length == 0) break;
        }
    }
    return (int)least;
}

int quota_cores_now() {
    static std::atomic<int> known{0};
    static std::atomic<long long> until{0};
    const long long now =
        std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    if (known.load(std::memory_order_relaxed) == 0 || now >= until.load(std::memory_order_relaxed)) {
        until.store(now + 1000, std::memory_order_relaxed);
        known.store(quota_cores(), std::memory_order_relaxed);
    }
    return known.load(std::memory_order_relaxed);
}

long futex(std::atomic<unsigned>* word, int operation, unsigned value) {
    return syscall(SYS_futex, (unsigned*)word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

// In one order with the sleeper's own steps: either it is counted here, or the kernel sees the new number and does not
// let it sleep.
void Signal::raise() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) futex(&value_, FUTEX_WAKE, INT_MAX);
}

void Signal::wait(unsigned old) {
    for (int spins = 0; spins < SPINS; spins++) {
        if (now() != old) return;
        relax();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (value_.load(std::memory_order_seq_cst) == old) futex(&value_, FUTEX_WAIT, old);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void Barrier::wait() {
    if (threads_ == 1) return;
    const unsigned round = signal_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        signal_.raise();
    } else {
        signal_.wait(round);
    }
}

int usable_cores() {
    // Room for machines with many more cores than a cpu_set_t.
    unsigned long mask[512];
    const long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
    int cores = 0;
    for (size_t i = 0; bytes > 0 && i < bytes / sizeof mask[0]; i++) cores += __builtin_popcountl(mask[i]);
    return std::max(1, std::min(cores > 0 ? cores : INT_MAX, quota_cores_now()));
}

void run_on_team(int threads, Work begin, Work work) {
    if (threads > 1) threads = std::min(threads, usable_cores());
    if (threads > 1) {
        Pool& pool = the_pool();
        std::unique_lock<std::mutex> lock(pool.in_use, std::try_to_lock);
        if (lock.owns_lock()) {
            threads = pool.prepare(threads);
            begin(0, threads);
            return pool.run(threads, work);
        }
    }
    begin(0, 1);
    work(0, 1);
}

}  // namespace tp
