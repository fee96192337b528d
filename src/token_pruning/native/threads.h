// One pool of worker threads for the process, and what a team of threads needs to work together on one call.
#pragma once

#include <atomic>
#include <functional>

namespace tp {

// Where the threads of a team wait for each other. Spins, then yields: the waits are microseconds long.
class Barrier {
public:
    // Before any thread waits.
    void expect(int threads) { threads_ = threads; }
    void wait();

private:
    int threads_ = 1;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

// Runs work(rank, threads) for every rank in [0, threads), rank 0 on the calling thread. `threads` is at most what was
// asked for: while another call has the pool, a call runs on its own thread alone, so that many callers get a thread
// each instead of waiting in line. Results never depend on the number of threads.
void run_on_team(int threads, const std::function<void(int rank, int threads)>& work);

}  // namespace tp
