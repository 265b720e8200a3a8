// Threads that wait for work: they spin for some microseconds and then sleep, so that a busy neighbour loses nothing.
#ifndef SIGNBIT_POOL_H
#define SIGNBIT_POOL_H

#include <stddef.h>

namespace signbit {

// Calls body(context, i) for each i in [0, tasks) on up to `threads` threads, the caller one of them. Whoever is free
// takes the next i: a late thread costs nothing. Called while another Python thread is inside, it runs on the caller.
void parallel(int threads, int tasks, void (*body)(void *, int), void *context);

// Memory of the calling thread, 64-byte aligned, kept for its next call; null if there is none to be had.
void *scratch(size_t bytes);

} // namespace signbit
#endif
