// Rows of 64-bit keys, each sorted by falling key.
//
// keys (Q, M) int64, of which row q uses the first counts[q]; what lies behind them is neither read nor written.
//
//   sort_runs    grid (Q, ceil(M / RUN)): sorts a run of RUN keys in place. Bitonic, in registers.
//   merge_runs   grid (Q, ceil(M / THREADS)): one key per thread. Its place is its place in its run and, for every
//                other run, the number of keys there that come before it: one binary search per run, so that any
//                number of runs is merged by one launch that needs no shared memory.
//
// A run has places 0, 1, 2, ...; thread t holds the E places from t * E on. Keys are compared with those of places a
// power of two away, or, where two sorted halves meet, in mirror image, so that all comparisons put the larger key
// first. Partners lie in the same thread; in the same warp, by shuffles; and only beyond it in shared memory, between
// barriers: 12 of them for 2,048 keys. A run of up to 32 * EACH keys takes one warp and no barrier, one of up to 128
// fewer keys for each of its lanes.

#define LOWEST (-0x7fffffffffffffffll - 1)
#define WARP_MASK 0xffffffffu
#define RUN (THREADS * EACH)
// Shared memory holds place e of each thread side by side. Two places between these rows put keys that follow one
// another in the run into different banks.
#define PITCH (THREADS + 2)

static_assert(EACH >= 4 && (EACH & (EACH - 1)) == 0 && (THREADS & (THREADS - 1)) == 0 && THREADS >= 64,
              "places are counted in powers of two, and a run of 128 has one warp");

// The larger key first. The other by exclusive or: the compiler would make a second comparison for it.
__device__ __forceinline__ void sort_pair(long long& a, long long& b) {
    const long long both = a ^ b;
    if (a < b) a = b;
    b = both ^ a;
}

// Of a key and that of a later or an earlier place, the one that belongs here.
__device__ __forceinline__ long long sort_keep(long long key, long long other, bool earlier) {
    return (key < other) == earlier ? other : key;
}

// The last steps of a merge: distances of `step` lanes and less, then those inside the thread.
template <int E>
__device__ __forceinline__ void sort_lanes(long long (&key)[E], int step) {
#pragma unroll 1
    for (; step > 0; step /= 2) {
        const bool earlier = (threadIdx.x & step) == 0;
#pragma unroll
        for (int e = 0; e < E; ++e) key[e] = sort_keep(key[e], __shfl_xor_sync(WARP_MASK, key[e], step), earlier);
    }
#pragma unroll
    for (int distance = E / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int e = 0; e < E; ++e)
            if ((e & distance) == 0) sort_pair(key[e], key[e + distance]);
}

// Sorts the 32 * E keys of each warp.
template <int E>
__device__ __forceinline__ void sort_warp(long long (&key)[E]) {
#pragma unroll
    for (int length = 2; length <= E; length *= 2) {
#pragma unroll
        for (int e = 0; e < E; ++e)
            if ((e & length / 2) == 0) sort_pair(key[e], key[e ^ (length - 1)]);
#pragma unroll
        for (int distance = length / 4; distance > 0; distance /= 2)
#pragma unroll
            for (int e = 0; e < E; ++e)
                if ((e & distance) == 0) sort_pair(key[e], key[e + distance]);
    }
#pragma unroll 1
    for (int lanes = 2; lanes <= 32; lanes *= 2) {
        const bool earlier = (threadIdx.x & lanes / 2) == 0;
#pragma unroll
        for (int e = 0; e < E / 2; ++e) {
            const long long low = __shfl_xor_sync(WARP_MASK, key[E - 1 - e], lanes - 1);
            const long long high = __shfl_xor_sync(WARP_MASK, key[e], lanes - 1);
            key[e] = sort_keep(key[e], low, earlier);
            key[E - 1 - e] = sort_keep(key[E - 1 - e], high, earlier);
        }
        sort_lanes(key, lanes / 4);
    }
}

// Key e of thread t is key e * threads + t in memory: before they are sorted, any order will do.
template <int E>
__device__ __forceinline__ void sort_load(const long long* keys, int size, int threads, long long (&key)[E]) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
        const int i = e * threads + threadIdx.x;
        key[e] = i < size ? keys[i] : LOWEST;
    }
}

template <int E>
__device__ __forceinline__ void sort_share(const long long (&key)[E], long long* run) {
#pragma unroll
    for (int e = 0; e < E; ++e) run[e * PITCH + threadIdx.x] = key[e];
}

// Place i, from shared memory.
template <int E>
__device__ __forceinline__ void sort_store(long long* keys, int size, int threads, const long long* run) {
    for (int i = threadIdx.x; i < size; i += threads) keys[i] = run[i % E * PITCH + i / E];
}

// Up to 32 * E keys, by the first warp.
template <int E>
__device__ __forceinline__ void sort_short(long long* keys, int size, long long* run) {
    if (threadIdx.x >= 32) return;
    long long key[E];
    sort_load(keys, size, 32, key);
    sort_warp(key);
    sort_share(key, run);
    __syncwarp();
    sort_store<E>(keys, size, 32, run);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sort_runs(long long* __restrict__ keys, const long long* __restrict__ counts, int capacity) {
    __shared__ long long run[EACH * PITCH];
    const int first = blockIdx.y * RUN;
    const int size = min(RUN, static_cast<int>(counts[blockIdx.x]) - first);
    if (size < 2) return;  // the whole block, here and below
    keys += static_cast<long long>(blockIdx.x) * capacity + first;
    if (size <= 64) return sort_short<2>(keys, size, run);
    if (size <= 128) return sort_short<4>(keys, size, run);
    if (size <= 32 * EACH) return sort_short<EACH>(keys, size, run);
    int threads = 64;  // that hold keys; the other warps only come to the barriers
    while (threads * EACH < size) threads *= 2;
    const bool busy = threadIdx.x < threads;
    long long key[EACH];
    if (busy) {
        sort_load(keys, size, threads, key);
        sort_warp(key);
    }
#pragma unroll 1
    for (int length = 64; length <= threads; length *= 2) {
        // The mirror image of all `length` threads, then distances that halve.
#pragma unroll 1
        for (int step = length / 2; step >= 32; step /= 2) {
            const bool mirror = step == length / 2, earlier = (threadIdx.x & step) == 0;
            const int partner = threadIdx.x ^ (mirror ? length - 1 : step);
            if (busy) sort_share(key, run);
            __syncthreads();
            if (busy) {
#pragma unroll
                for (int e = 0; e < EACH; ++e)
                    key[e] = sort_keep(key[e], run[(mirror ? EACH - 1 - e : e) * PITCH + partner], earlier);
            }
            __syncthreads();  // all have read
        }
        if (busy) sort_lanes(key, 16);
    }
    if (busy) sort_share(key, run);
    __syncthreads();
    sort_store<EACH>(keys, size, THREADS, run);
}

// How many of the falling keys are above a key, or not below it.
__device__ __forceinline__ int count_before(const long long* __restrict__ keys, int size, long long key, bool equal) {
    int low = 0, high = size;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (keys[middle] > key || (equal && keys[middle] == key)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS)
merge_runs(const long long* __restrict__ keys, const long long* __restrict__ counts, long long* __restrict__ sorted,
           int capacity) {
    const int count = static_cast<int>(counts[blockIdx.x]), i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= count) return;
    keys += static_cast<long long>(blockIdx.x) * capacity;
    const long long key = keys[i];
    int place = i % RUN;
    for (int first = 0; first < count; first += RUN) {
        // Equal keys keep the order of their runs.
        if (first != i - i % RUN) place += count_before(keys + first, min(RUN, count - first), key, first < i);
    }
    sorted[static_cast<long long>(blockIdx.x) * capacity + place] = key;
}
