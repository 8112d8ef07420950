// Shared memory declared in a template, of which a compiler may drop the section. FAULT leaves out the barrier.

template <int N>
__device__ __forceinline__ int count_in_template(bool flag) {
    __shared__ int flags[N];
    flags[threadIdx.x] = flag;
    if (!FAULT) __syncthreads();
    int count = 0;
    for (int i = 0; i < N; i++) count += flags[i];
    return count;
}

extern "C" __global__ void __launch_bounds__(THREADS) in_template(int* out) {
    out[threadIdx.x] = count_in_template<THREADS>(threadIdx.x % 2);
}
