// Kernels with planted faults, and their sound twins: what the emulator must catch and must not.

#include "scalar.cuh"

// Sum over a block in shared memory. FAULT 1 leaves out the barrier of the tree.
extern "C" __global__ void __launch_bounds__(THREADS) block_sum(const float* in, float* out, int count) {
    __shared__ float part[THREADS];
    const int i = blockIdx.x * THREADS + threadIdx.x;
    part[threadIdx.x] = i < count ? in[i] : 0.0f;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
#if FAULT != 1
        __syncthreads();
#endif
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// Out of place copy. FAULT 2 writes one element too many, FAULT 3 in shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) copy(const float* in, float* out, int count) {
    __shared__ float held[THREADS];
    const int i = blockIdx.x * THREADS + threadIdx.x;
    held[threadIdx.x + (FAULT == 3 ? 1 : 0)] = i < count ? in[i] : 0.0f;
    if (i < count + (FAULT == 2 ? 1 : 0)) out[i] = held[threadIdx.x + (FAULT == 3 ? 1 : 0)];
}

// FAULT 4: half of the block takes another barrier. FAULT 5: half of the block takes none.
extern "C" __global__ void __launch_bounds__(THREADS) split(int* out) {
#if FAULT == 4
    if (threadIdx.x < THREADS / 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
#elif FAULT == 5
    if (threadIdx.x < THREADS / 2) __syncthreads();
#else
    __syncthreads();
#endif
    out[threadIdx.x] = threadIdx.x;
}

// Position of the largest value, the lowest at a tie, by shuffles. FAULT 6 lets the highest win; FAULT 7 leaves lanes out.
extern "C" __global__ void __launch_bounds__(32) arg_max(const float* in, int* out) {
    float best = in[threadIdx.x];
    int index = threadIdx.x;
#if FAULT == 7
    if (threadIdx.x < 24)
#endif
        for (int step = 16; step > 0; step /= 2) {
            const float value = __shfl_xor_sync(0xffffffffu, best, step);
            const int other = __shfl_xor_sync(0xffffffffu, index, step);
            if (value > best || (value == best && (FAULT == 6 ? other > index : other < index))) {
                best = value;
                index = other;
            }
        }
    if (threadIdx.x == 0) out[0] = index;
}

// FAULT 8: a block reads what another block of the launch writes.
extern "C" __global__ void __launch_bounds__(THREADS) neighbour(int* data, int count) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
#if FAULT == 8
    data[i] = data[(i + THREADS) % count] + 1;
#else
    data[i] = data[i] + 1;
#endif
}

// Dynamic shared memory, one float for each thread. FAULT 9 uses one more, FAULT 10 leaves the first unwritten.
extern "C" __global__ void __launch_bounds__(THREADS) reverse(const float* in, float* out) {
    DYNAMIC_SHARED(float, held);
    if (FAULT != 10 || threadIdx.x > 0) held[threadIdx.x] = in[threadIdx.x];
    if (FAULT == 9 && threadIdx.x == 0) held[THREADS] = 0.0f;
    __syncthreads();
    out[threadIdx.x] = held[THREADS - 1 - threadIdx.x];
}

// Sum over all blocks by the one that comes last. FAULT 11 leaves out the fence before the atomic, FAULT 12 the one after.
extern "C" __global__ void __launch_bounds__(THREADS) last_block(const float* in, float* part, int* arrived, float* out) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        part[blockIdx.x] = in[blockIdx.x];
        if (FAULT != 11) __threadfence();
        last = atomicAdd(arrived, 1) == static_cast<int>(gridDim.x) - 1;
        if (FAULT != 12) __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x > 0) return;
    float sum = 0.0f;
    for (int i = 0; i < static_cast<int>(gridDim.x); ++i) sum += part[i];
    *out = sum;
}

// Number of threads, counted atomically. FAULT 13 leaves out the barrier between the plain write and the atomics,
// FAULT 14 the one between the atomics and the plain read, FAULT 15 that before the next plain write.
extern "C" __global__ void __launch_bounds__(THREADS) tally(int* out) {
    __shared__ int total;
    for (int round = 0; round < 2; round++) {
        if (threadIdx.x == 0) total = 0;
        if (FAULT != 13) __syncthreads();
        atomicAdd(&total, 1);
        if (FAULT != 14) __syncthreads();
        out[threadIdx.x] = total;
        if (FAULT != 15) __syncthreads();
    }
}

// Each lane gets its neighbour's value through shared memory. FAULT 16 lets a vote stand for the barrier of the warp, and
// FAULT 17 a shuffle for the one that keeps the next round's write behind the read.
extern "C" __global__ void __launch_bounds__(32) pass_on(int* out) {
    __shared__ int held[32];
    int value = threadIdx.x;
    for (int round = 0; round < 2; round++) {
        held[threadIdx.x] = value;
        FAULT == 16 ? (void)__ballot_sync(0xffffffffu, value) : __syncwarp();
        value = held[(threadIdx.x + 1) % 32];
        FAULT == 17 ? (void)__shfl_sync(0xffffffffu, value, 0) : __syncwarp();
    }
    out[threadIdx.x] = value;
}
