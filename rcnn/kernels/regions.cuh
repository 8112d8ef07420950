// Regions of interest by the tiles of the map that they touch, for backward kernels that own their output.
//
// A block that owns a tile of a gradient map adds up all that regions send there, in the order of the regions, and
// writes each cell once: no atomics, no zero fill, and the same bits in every run. It must find its regions, so
// `sort_regions` (one launch, one block per segment: an image, or a level of an image) first lists the regions segment
// after segment with the cells that each touches, and `find_regions` picks those that touch a tile, a block's worth of
// candidates at a time. Both keep the order of the regions; neither needs a capacity or waits for the host.
//
// Their shared memory is declared in the kernels and passed: g++, which builds them for the emulator, drops the section
// that marks it in a template.

// Image of a region, or -1 if it names none: NaN fails both comparisons.
__device__ __forceinline__ int region_image(const float* region, int batch) {
    const float image = region[0];
    return image >= 0.0f && image < static_cast<float>(batch) ? static_cast<int>(image) : -1;
}

// Cells that a region touches in the map of its segment, all borders included; segment -1: none.
struct Touched {
    int segment, top, left, bottom, right;
};

// Number of flagged threads with a lower index, and of all flagged threads of a block of N. To be called by all, with
// `sums` in shared memory, a number for each warp.
template <int WARPS>
__device__ __forceinline__ int rank_in_block(bool flag, int (&sums)[WARPS], int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned flags = __ballot_sync(0xffffffffu, flag);
    if (lane == 0) sums[warp] = __popc(flags);
    __syncthreads();
    int rank = __popc(flags & ((1u << lane) - 1u));
    total = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) rank += sums[i];
        total += sums[i];
    }
    __syncthreads();  // before the next call writes the sums
    return rank;
}

// One block of N threads for each segment: writes which regions belong to it, and what they touch, behind those of the
// segments before it, and in offsets[segment] where they begin. `touched(i)` says what region i touches; `before` and
// `sums` are shared memory.
template <int N, class F>
__device__ __forceinline__ void sort_regions(int regions, int* order, int4* cells, int* offsets, int& before,
                                             int (&sums)[N / 32], F touched) {
    const int segment = blockIdx.x;
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    int own = 0;
    for (int i = threadIdx.x; i < regions; i += N) {
        const int other = touched(i).segment;
        own += other >= 0 && other < segment;
    }
    if (own) atomicAdd(&before, own);
    __syncthreads();
    int end = before;
    if (threadIdx.x == 0) offsets[segment] = end;
    for (int first = 0; first < regions; first += N) {
        const int i = first + threadIdx.x;
        Touched t = {-1, 0, 0, 0, 0};
        if (i < regions) t = touched(i);
        int found;
        const int place = end + rank_in_block(t.segment == segment, sums, found);
        if (t.segment == segment) {
            order[place] = i;
            cells[place] = make_int4(t.top, t.left, t.bottom, t.right);
        }
        end += found;
    }
    if (threadIdx.x == 0 && segment + 1 == static_cast<int>(gridDim.x)) offsets[segment + 1] = end;
}

// Of the N sorted regions from `first` on, those that touch the square tile with its first cell at (top, left): their
// numbers go to `list` in rising order. Gives how many; the list is there for all threads of the block. `list` and
// `sums` are shared memory.
template <int N, int TILE_SIDE>
__device__ __forceinline__ int find_regions(const int* order, const int4* cells, int first, int last, int top, int left,
                                            int (&list)[N], int (&sums)[N / 32]) {
    const int i = first + threadIdx.x;
    bool touches = false;
    if (i < last) {
        const int4 c = cells[i];
        touches = c.x < top + TILE_SIDE && c.z >= top && c.y < left + TILE_SIDE && c.w >= left;
    }
    int found;
    const int place = rank_in_block(touches, sums, found);
    if (touches) list[place] = order[i];
    __syncthreads();
    return found;
}
