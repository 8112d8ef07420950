// Rows of 64-bit keys, each sorted by falling key.
//
// keys (Q, M) int64, of which row q uses the first counts[q]; what lies behind them is neither read nor written.
//
//   sort_runs    grid (Q, ceil(M / RUN)): sorts a run of RUN keys in place. Bitonic, in shared memory.
//   merge_runs   grid (Q, ceil(M / THREADS)): one key per thread. Its place is its place in its run and, for every
//                other run, the number of keys there that come before it: one binary search per run, so that any
//                number of runs is merged by one launch that needs no shared memory.
//
// RUN keys are 16 KB of shared memory. A block handles two keys per thread at a time.

#define LOWEST (-0x7fffffffffffffffll - 1)

extern "C" __global__ void __launch_bounds__(THREADS)
sort_runs(long long* __restrict__ keys, const long long* __restrict__ counts, int capacity) {
    __shared__ long long run[RUN];
    const int first = blockIdx.y * RUN;
    const int size = min(RUN, static_cast<int>(counts[blockIdx.x]) - first);
    if (size < 2) return;  // the whole block
    keys += static_cast<long long>(blockIdx.x) * capacity + first;
    // At least 64, the keys of one warp: whole warps then take part in every step or stay out of it.
    int padded = 64;
    while (padded < size) padded *= 2;
    for (int i = threadIdx.x; i < padded; i += THREADS) run[i] = i < size ? keys[i] : LOWEST;
    __syncthreads();
    for (int length = 2; length <= padded; length *= 2) {
        for (int stride = length / 2; stride > 0; stride /= 2) {
            for (int pair = threadIdx.x; pair < padded / 2; pair += THREADS) {
                const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                const long long a = run[low], b = run[high];
                if ((a < b) == ((low & length) == 0)) {
                    run[low] = b;
                    run[high] = a;
                }
            }
            // Pairs at a stride of 32 or less stay within the 64 keys of a warp. The step after this one has half the
            // stride or, after a stride of 1, starts the next length.
            const int next = stride > 1 ? stride / 2 : length;
            if (max(stride, next) > 32) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    for (int i = threadIdx.x; i < size; i += THREADS) keys[i] = run[i];
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
