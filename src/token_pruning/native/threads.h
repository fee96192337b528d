// One pool of worker threads for the process, and what a team of threads needs to work together on one call.
#pragma once

#include <atomic>

namespace tp {

// A number that rises, and threads that wait for it to: they spin for some tens of microseconds, then sleep, so that a
// core that somebody else needs is left to them.
class Signal {
public:
    unsigned now() const { return value_.load(std::memory_order_acquire); }
    void raise();
    // Until the number is no longer `old`.
    void wait(unsigned old);

private:
    std::atomic<unsigned> value_{0};
    std::atomic<int> sleepers_{0};
};

// Where the threads of a team wait for each other.
class Barrier {
public:
    // Before any thread waits.
    void expect(int threads) { threads_ = threads; }
    void wait();

private:
    int threads_ = 1;
    std::atomic<int> arrived_{0};
    Signal signal_;
};

// Cores that the calling thread may use now: its affinity mask and the control group's quota, at least 1. The quota is
// read again once a second at most.
int usable_cores();

// A function that is called but not kept, so that handing one over allocates nothing.
class Work {
public:
    template <class Function>
    Work(Function& function)
        : function_(&function), call_([](void* f, int rank, int threads) { (*(Function*)f)(rank, threads); }) {}
    void operator()(int rank, int threads) const { call_(function_, rank, threads); }

private:
    void* function_;
    void (*call_)(void*, int, int);
};

// Runs begin(0, threads) on the calling thread, then work(rank, threads) for every rank in [0, threads), rank 0 on the
// calling thread. `threads` is at most what was asked for, and at most usable_cores(): more would only wait for each
// other. While another call has the pool, a call runs on its own thread alone, so that many callers get a thread each
// instead of waiting in line; the same where no more threads can be started. Results never depend on the number of
// threads. What a thread throws is thrown again here, after all have ended; a thread that others wait for at a barrier
// must not throw.
void run_on_team(int threads, Work begin, Work work);

}  // namespace tp
