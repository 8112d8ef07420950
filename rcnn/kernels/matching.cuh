// Tiles of boxes against rows of ground truth, for matching.cu.
//
// A warp is a tile: EACH boxes for each lane (one for proposals, which are few), neighbours in memory and so, if they
// are anchors, on the image. It knows the bounding box of its tile, and the areas of the smallest and the largest box.
// Each lane tests by them whether a ground-truth row could have an IoU with a box that matters, a ballot collects such
// rows, and all lanes then look at those, by rising row. Any number of rows, and no barrier. The boxes of a tile lie in
// shared memory, for the sake of the registers; no other warp reads them. Needs box.cuh, THREADS and EACH.

#define WARP_MASK 0xffffffffu
#define INT_LIMIT 0x7fffffff

// Boxes of one warp, lane by lane. Those that overlap nothing are turned inside out, and stretch no bounding box.
template <int N>
struct MatchTile {
    float* boxes;             // of the block, in shared memory
    unsigned in_use;          // bit e: box e takes part
    Box bound;
    float smallest, largest;  // areas above 0
};

// Number of box `slot` of this lane in its image, which has its blocks numbered.
template <int N>
__device__ __forceinline__ int match_index(int block, int slot) {
    return (block * THREADS + threadIdx.x) / 32 * 32 * N + slot * 32 + threadIdx.x % 32;
}

// Place of the same box in shared memory, which only this warp uses.
__device__ __forceinline__ int match_slot(int slot) {
    return slot * THREADS + threadIdx.x;
}

// Largest of the warp.
__device__ __forceinline__ int match_warp_max(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(WARP_MASK, value);
#else
    for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(WARP_MASK, value, step));
    return value;
#endif
}

// The same of floats that are not NaN, by integers of the same order.
__device__ __forceinline__ float match_warp_max(float value) {
    const int bits = __float_as_int(value), most = match_warp_max(bits ^ (bits >> 31 & INT_LIMIT));
    return __int_as_float(most ^ (most >> 31 & INT_LIMIT));
}

// load(i, box) gives whether box i takes part, and the box.
template <int N, class Load>
__device__ __forceinline__ MatchTile<N> match_tile(float4* boxes, int block, int count, Load load) {
    const float infinity = __uint_as_float(0x7f800000u);
    MatchTile<N> tile;
    tile.boxes = reinterpret_cast<float*>(boxes);
    tile.in_use = 0;
    tile.bound = {infinity, infinity, -infinity, -infinity};
    tile.smallest = infinity;
    tile.largest = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const int i = match_index<N>(block, e);
        Box b = {0.0f, 0.0f, 0.0f, 0.0f};
        const bool used = i < count && load(i, b);
        tile.in_use |= static_cast<unsigned>(used) << e;
        const float area = box_area(b);
        const bool counts = used && is_finite(area);  // only if all coordinates are
        b = {counts ? b.x1 : infinity, counts ? b.y1 : infinity, counts ? b.x2 : -infinity, counts ? b.y2 : -infinity};
        tile.smallest = fminf(tile.smallest, counts && area > 0.0f ? area : infinity);
        tile.largest = fmaxf(tile.largest, counts ? area : 0.0f);
        store_box(tile.boxes, match_slot(e), b);
        tile.bound = {fminf(tile.bound.x1, b.x1), fminf(tile.bound.y1, b.y1), fmaxf(tile.bound.x2, b.x2),
                      fmaxf(tile.bound.y2, b.y2)};
    }
    tile.bound = {-match_warp_max(-tile.bound.x1), -match_warp_max(-tile.bound.y1), match_warp_max(tile.bound.x2),
                  match_warp_max(tile.bound.y2)};
    tile.smallest = -match_warp_max(-tile.smallest);
    tile.largest = match_warp_max(tile.largest);
    return tile;
}

// Ground truth of the batch, and the rows of one image.
struct MatchTruth {
    const float* boxes;
    const long long* labels;
    int first, last;
};

__device__ __forceinline__ MatchTruth match_truth(const float* boxes, const long long* labels, const long long* offsets,
                                                  int rows, int image) {
    const long long limit = rows;
    const long long first = max(offsets[image], 0ll), last = min(offsets[image + 1], limit);
    return {boxes, labels, static_cast<int>(min(first, limit)), static_cast<int>(last)};
}

// The quick test: where the IoU of a box and a row is at least `limit`, their intersection is above the sum of their
// areas times the fraction; elsewhere it seldom is. It takes no division.
//
// With e = 2^-24, s = fl(a + b) and u = fl(s - inter) >= (s - inter)(1 - e), fl(inter / u) >= limit needs
// inter / u >= limit * (1 - e), so inter >= (s - inter) * limit * (1 - e)^2 and inter >= s * limit / (1 + limit) *
// (1 - e)^2. The fraction is limit / (1 + limit) * (1 - 64e) with three roundings and its product with s adds one: less
// than that. It is 0, which is no limit, where underflow could take bits: s is at least the area of the row, as no box
// with a negative area has an intersection. Where s overflows the IoU is 0.
__device__ __forceinline__ float match_fraction(float limit, float area) {
    const float fraction = limit < 1e-18f ? 0.0f : limit / (1.0f + limit) * (1.0f - 0x1p-18f);
    return area * fraction < 1e-30f ? 0.0f : fraction;
}

// Whether a box of the tile could pass the quick test. A box has an area a from the smallest to the largest and an
// intersection with the row of at most `inter`, that of the bounding box, and of at most a. Its part of the sum is then
// at most min(inter, a) / (a + area of the row), which rises until a = inter and falls from there on. The roundings, of
// which there are five at most, are within the 64e. In halves, lest the sum overflows where that of no box does.
template <int N>
__device__ __forceinline__ bool match_possible(const MatchTile<N>& tile, float inter, float area, float fraction) {
    const float best = fminf(fmaxf(inter, tile.smallest), tile.largest);
    return fraction == 0.0f || 0.5f * fminf(inter, best) > (0.5f * best + 0.5f * area) * fraction;
}

// Calls visit(row, box, its area, fraction, ignore region or not) for the rows with which a box of the tile could have
// an IoU of limit(row, needed or not), and the ignore regions that meet the tile; by rising row, all lanes at once.
template <int N, class Limit, class Visit>
__device__ __forceinline__ void match_meetings(const MatchTile<N>& tile, const MatchTruth& truth, Limit limit,
                                               Visit visit) {
    for (int base = truth.first; base < truth.last; base += 32) {
        const int mine = base + threadIdx.x % 32;
        bool meets = false, ignore = false;
        float fraction = 0.0f;
        if (mine < truth.last) {
            const Box t = load_box(truth.boxes, mine);
            const long long label = truth.labels[mine];
            const float area = box_area(t), inter = box_intersection(tile.bound, t);
            ignore = label < 0;
            meets = label != 0 && is_finite(area) && inter > 0.0f;
            const float least = limit(mine, meets && !ignore);
            if (meets && !ignore) {
                fraction = match_fraction(least, area);
                meets = match_possible(tile, inter, area, fraction);
            }
        }
        const unsigned regions = __ballot_sync(WARP_MASK, ignore);
        for (unsigned left = __ballot_sync(WARP_MASK, meets); left; left &= left - 1) {
            const int source = __ffs(static_cast<int>(left)) - 1;
            const Box t = load_box(truth.boxes, base + source);
            visit(base + source, t, box_area(t), __shfl_sync(WARP_MASK, fraction, source),
                  (regions >> source & 1u) != 0);
        }
    }
}
