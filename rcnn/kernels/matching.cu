// Which ground-truth box each anchor or proposal belongs to, and the draw of those that enter the losses.
//
// match_reach             grid (tiles, B)          the largest IoU of each ground-truth row, for the low-quality rule
// match_assign            grid (tiles, B)          state of each box of match and match_anchors
// match_assign_proposals  grid (tiles, B)          the same of proposals, joined by the ground truth of their image
// match_gather            grid (spans, B)          small sampling keys of positives and negatives, into two lists
// match_draw_anchors      grid (parts, 2, B)       the smallest keys of the lists, in order, and their deltas
// match_draw_proposals    grid (parts, 2, B)       the same for the RoI head
//
// Blocks have THREADS threads. A launch only reads what the launches before it wrote.
//
// A warp is a tile: EACH boxes for each lane (one for proposals, which are few), neighbours in memory and so, if they
// are anchors, on the image. It knows the bounding box of its tile. Each lane tests one ground-truth row against it,
// a ballot collects the rows that meet, and all lanes then look at those, by rising row. No shared memory, no barrier,
// any number of rows, and no matrix: match_reach and match_assign compute the same IoU twice, to the same bits, which
// for the few rows that a tile meets is cheaper than writing even one float per anchor.
//
// Boxes are read, 16 bytes each, and not computed from level and cell: all images share the reads through the L2 cache,
// and the same kernels serve match() and proposals.
//
// Memory beside the outputs: `state`, 4 bytes per box; `reach`, 4 per row; the lists, 12 for each place.
// Source: the rules of torchvision's Matcher, with the differences that rcnn/kernels/matching.py names.

#include "box.cuh"

#define WARP_MASK 0xffffffffu
// State of a box: its ground-truth row, or one of these.
#define NEGATIVE (-1)
#define IGNORED (-2)

typedef unsigned long long MatchKey;

// Boxes of one warp, lane by lane. Those that overlap nothing are turned inside out, and stretch no bounding box.
template <int N>
struct MatchTile {
    Box boxes[N];
    float areas[N];
    unsigned in_use;  // bit e: box e takes part
    Box bound;
};

// Number of box `slot` of this lane in its image.
template <int N>
__device__ __forceinline__ int match_index(int slot) {
    const int warp = (blockIdx.x * THREADS + threadIdx.x) / 32;
    return warp * 32 * N + slot * 32 + threadIdx.x % 32;
}

// load(i, box) gives whether box i takes part, and the box.
template <int N, class Load>
__device__ __forceinline__ MatchTile<N> match_tile(int count, Load load) {
    const float infinity = __uint_as_float(0x7f800000u);
    MatchTile<N> tile;
    tile.in_use = 0;
    tile.bound = {infinity, infinity, -infinity, -infinity};
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const int i = match_index<N>(e);
        Box b = {0.0f, 0.0f, 0.0f, 0.0f};
        const bool used = i < count && load(i, b);
        tile.in_use |= static_cast<unsigned>(used) << e;
        tile.areas[e] = box_area(b);  // finite only if all coordinates are
        if (!used || !is_finite(tile.areas[e])) b = {infinity, infinity, -infinity, -infinity};
        tile.boxes[e] = b;
        tile.bound = {fminf(tile.bound.x1, b.x1), fminf(tile.bound.y1, b.y1), fmaxf(tile.bound.x2, b.x2),
                      fmaxf(tile.bound.y2, b.y2)};
    }
    for (int step = 16; step > 0; step /= 2) {
        tile.bound.x1 = fminf(tile.bound.x1, __shfl_xor_sync(WARP_MASK, tile.bound.x1, step));
        tile.bound.y1 = fminf(tile.bound.y1, __shfl_xor_sync(WARP_MASK, tile.bound.y1, step));
        tile.bound.x2 = fmaxf(tile.bound.x2, __shfl_xor_sync(WARP_MASK, tile.bound.x2, step));
        tile.bound.y2 = fmaxf(tile.bound.y2, __shfl_xor_sync(WARP_MASK, tile.bound.y2, step));
    }
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

// Calls visit(row, box, ignore region or not) for the rows that meet the bounding box, by rising row; all lanes at once.
template <class Visit>
__device__ __forceinline__ void match_meetings(const Box& bound, const MatchTruth& truth, Visit visit) {
    for (int base = truth.first; base < truth.last; base += 32) {
        const int mine = base + threadIdx.x % 32;
        bool meets = false, ignore = false;
        if (mine < truth.last) {
            const Box t = load_box(truth.boxes, mine);
            const long long label = truth.labels[mine];
            ignore = label < 0;
            meets = label != 0 && is_finite(box_area(t)) && fminf(bound.x2, t.x2) > fmaxf(bound.x1, t.x1) &&
                    fminf(bound.y2, t.y2) > fmaxf(bound.y1, t.y1);
        }
        const unsigned regions = __ballot_sync(WARP_MASK, ignore);
        for (unsigned left = __ballot_sync(WARP_MASK, meets); left; left &= left - 1) {
            const int source = __ffs(static_cast<int>(left)) - 1;
            visit(base + source, load_box(truth.boxes, base + source), (regions >> source & 1u) != 0);
        }
    }
}

// Largest of the warp. IoU is never negative, so that its bits order as integers.
__device__ __forceinline__ int match_warp_max(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(WARP_MASK, value);
#else
    for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(WARP_MASK, value, step));
    return value;
#endif
}

// Anchor i of an image. One that reaches more than `border` beyond the image takes no part.
__device__ __forceinline__ bool match_anchor(const float* boxes, int i, const float* size, float border, Box& b) {
    b = load_box(boxes, i);
    return !size || !(b.x1 < -border || b.y1 < -border || b.x2 > size[1] + border || b.y2 > size[0] + border);
}

// Writes the state of the boxes of a tile, and counts positives and negatives of the image in `tally`.
template <int N>
__device__ __forceinline__ void match_states(const MatchTile<N>& tile, const MatchTruth& truth, int count,
                                             const int* reach, float high, float low, int* state, int* tally) {
    float best[N];
    int row[N];
    unsigned raised = 0, covered = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        best[e] = 0.0f;
        row[e] = NEGATIVE;
    }
    match_meetings(tile.bound, truth, [&](int other, const Box& t, bool ignore) {
        const float area = box_area(t), reached = reach && !ignore ? __int_as_float(reach[other]) : 0.0f;
#pragma unroll
        for (int e = 0; e < N; ++e) {
            if (ignore) {  // the same in all lanes
                const float inside = box_intersection(tile.boxes[e], t);
                covered |= static_cast<unsigned>(inside > 0.0f && inside >= 0.5f * tile.areas[e]) << e;
                continue;
            }
            const float iou = box_iou(tile.boxes[e], tile.areas[e], t, area);
            if (iou > best[e]) {  // rows come rising: the lowest wins a tie
                best[e] = iou;
                row[e] = other;
            }
            raised |= static_cast<unsigned>(iou > 0.0f && iou == reached) << e;
        }
    });
    int positives = 0, negatives = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        int value = IGNORED;
        if (tile.in_use >> e & 1u) {
            if (best[e] >= high || (raised >> e & 1u)) value = row[e];
            else if (best[e] < low && !(covered >> e & 1u)) value = NEGATIVE;
        }
        if (match_index<N>(e) < count) state[match_index<N>(e)] = value;
        positives += __popc(__ballot_sync(WARP_MASK, value >= 0));
        negatives += __popc(__ballot_sync(WARP_MASK, value == NEGATIVE));
    }
    if (tally && threadIdx.x % 32 == 0) {
        if (positives) atomicAdd(tally, positives);
        if (negatives) atomicAdd(tally + 1, negatives);
    }
}

// boxes (count, 4), those of image b from b * stride on; sizes (B, 2) or null; reach (rows) starts as 0.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    match_reach(const float* __restrict__ boxes, int stride, int count, const float* __restrict__ sizes, float border,
                const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                const long long* __restrict__ gt_offsets, int rows, int* reach) {
    const int image = blockIdx.y;
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, image);
    const MatchTile<EACH> tile = match_tile<EACH>(count, [&](int i, Box& b) {
        return match_anchor(boxes, image * stride + i, sizes ? sizes + 2 * image : nullptr, border, b);
    });
    match_meetings(tile.bound, truth, [&](int row, const Box& t, bool ignore) {
        if (ignore) return;  // the same in all lanes
        const float area = box_area(t);
        float most = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; ++e) most = fmaxf(most, box_iou(tile.boxes[e], tile.areas[e], t, area));
        const int bits = match_warp_max(__float_as_int(most));
        if (bits > 0 && threadIdx.x % 32 == 0) atomicMax(reach + row, bits);
    });
}

// As above; reach may be null; state (B, count); tally (B, 2) starts as 0, or is null.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    match_assign(const float* __restrict__ boxes, int stride, int count, const float* __restrict__ sizes, float border,
                 const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                 const long long* __restrict__ gt_offsets, int rows, const int* __restrict__ reach, float high,
                 float low, int* __restrict__ state, int* tally) {
    const int image = blockIdx.y;
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, image);
    const MatchTile<EACH> tile = match_tile<EACH>(count, [&](int i, Box& b) {
        return match_anchor(boxes, image * stride + i, sizes ? sizes + 2 * image : nullptr, border, b);
    });
    match_states(tile, truth, count, reach, high, low, state + image * count, tally ? tally + 2 * image : nullptr);
}

// Candidate i of an image: proposal i, or from `capacity` on the ground truth of the image.
__device__ __forceinline__ Box match_candidate(const float* proposals, int capacity, const float* gt_boxes, int first,
                                               int image, int i) {
    return i < capacity ? load_box(proposals, image * capacity + i) : load_box(gt_boxes, first + i - capacity);
}

// proposals (B, capacity, 4), of which in_use (B) are proposals; count = capacity + rows, enough for any image.
extern "C" __global__ void __launch_bounds__(THREADS)
    match_assign_proposals(const float* __restrict__ proposals, const long long* __restrict__ in_use, int capacity,
                           int count, const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                           const long long* __restrict__ gt_offsets, int rows, float high, float low,
                           int* __restrict__ state, int* tally) {
    const int image = blockIdx.y;
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, image);
    const MatchTile<1> tile = match_tile<1>(count, [&](int i, Box& b) {
        const int row = truth.first + i - capacity;
        if (i < capacity ? i >= in_use[image] : row >= truth.last) return false;
        b = match_candidate(proposals, capacity, gt_boxes, truth.first, image, i);
        return i < capacity || (gt_labels[row] > 0 && b.x2 > b.x1 && b.y2 > b.y1 && is_finite(box_area(b)));
    });
    match_states(tile, truth, count, nullptr, high, low, state + image * count, tally + 2 * image);
}

// The draw -------------------------------------------------------------------------------------------------------------

// The finaliser of splitmix64, a bijection: no two boxes of an image have the same key.
__device__ __forceinline__ MatchKey match_mix(MatchKey x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Where the keys of an image start; rcnn/kernels/sampling.py has the twin.
__device__ __forceinline__ MatchKey match_start(MatchKey origin, const long long* step, const long long* image_ids,
                                                int image) {
    const MatchKey at_step = match_mix(match_mix(origin) + static_cast<MatchKey>(*step));
    return match_mix(at_step + static_cast<MatchKey>(image_ids[image]));
}

__device__ __forceinline__ MatchKey match_key(MatchKey start, int i) {
    return match_mix(start + static_cast<MatchKey>(i) * 0x9E3779B97F4A7C15ull);
}

// 0 for a positive, 1 for a negative, the lists' order; 2 for what takes no part.
__device__ __forceinline__ int match_kind(int state) {
    return state >= 0 ? 0 : state == NEGATIVE ? 1 : 2;
}

// Keys are uniform, so that of n boxes about `expected` have one below expected / n of the range. `expected` lies
// above the number wanted, and `capacity`, the places of a list, above `expected`, each by eight standard deviations:
// the lists hold what is wanted unless the states follow the keys, which match_draw notices and mends.
// A kind of no more than `capacity` boxes goes into its list whole. found (B, 2) starts as 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    match_gather(const int* __restrict__ state, int count, const int* __restrict__ tally, float expected, int capacity,
                 MatchKey origin, const long long* __restrict__ step, const long long* __restrict__ image_ids,
                 int* found, MatchKey* __restrict__ keys, int* __restrict__ index) {
    __shared__ MatchKey start, limits[2];
    const int image = blockIdx.y;
    if (threadIdx.x == 0) start = match_start(origin, step, image_ids, image);
    if (threadIdx.x < 2) {
        const int n = tally[2 * image + threadIdx.x];
        limits[threadIdx.x] = n <= capacity ? ~0ull : static_cast<MatchKey>(expected / n * 18446744073709551616.0f);
    }
    __syncthreads();
    for (int e = 0; e < EACH; ++e) {
        const int i = (blockIdx.x * EACH + e) * THREADS + threadIdx.x;
        const int kind = i < count ? match_kind(state[image * count + i]) : 2;
        if (kind == 2) continue;
        const MatchKey key = match_key(start, i);
        if (key > limits[kind]) continue;
        const int list = 2 * image + kind, place = atomicAdd(found + list, 1);
        if (place >= capacity) continue;
        keys[list * capacity + place] = key;
        index[list * capacity + place] = i;
    }
}

// What a draw reads.
struct MatchDraw {
    const int* state;
    int count;
    const int* tally;
    int size, positives;
    const int* found;
    int capacity;
    MatchKey origin;
    const long long *step, *image_ids;
    MatchKey* keys;
    int* index;
    int* total;  // shared, for match_select
};

// Fills a list with exactly the `wanted` smallest keys of a kind, from the states of all boxes: the limit is found bit by
// bit. One block does it alone; it is slow, and the chance that random states come here is below 1e-13.
__device__ __forceinline__ void match_select(const MatchDraw& draw, int image, int kind, int wanted, MatchKey* keys,
                                          int* index) {
    int& total = *draw.total;
    const MatchKey start = match_start(draw.origin, draw.step, draw.image_ids, image);
    const int* state = draw.state + image * draw.count;
    MatchKey limit = 0;  // fewer than `wanted` keys lie below it
    for (int bit = 63; bit >= 0; --bit) {
        const MatchKey higher = limit | 1ull << bit;
        if (threadIdx.x == 0) total = 0;
        __syncthreads();
        int below = 0;
        for (int i = threadIdx.x; i < draw.count; i += THREADS)
            below += match_kind(state[i]) == kind && match_key(start, i) < higher;
        atomicAdd(&total, below);
        __syncthreads();
        if (total < wanted) limit = higher;
        __syncthreads();  // all have read the total
    }
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < draw.count; i += THREADS) {
        const MatchKey key = match_key(start, i);
        if (match_kind(state[i]) != kind || key > limit) continue;
        const int place = atomicAdd(&total, 1);
        keys[place] = key;
        index[place] = i;
    }
    __syncthreads();
}

// Calls write(slot, label, index) for each of the `size` slots of an image: label 1, then 0, then -1 in padding. The
// place of a row is the number of smaller keys in its list, so nothing is sorted. Blocks in y: the two kinds.
template <class Write>
__device__ __forceinline__ void match_draw(const MatchDraw& draw, int image, Write write) {
    const int kind = blockIdx.y, list = 2 * image + kind;
    const int positives = min(draw.tally[2 * image], draw.positives);
    const int before = kind == 0 ? 0 : positives;
    const int wanted = kind == 0 ? positives : min(draw.tally[list], draw.size - positives);
    MatchKey* keys = draw.keys + list * draw.capacity;
    int* index = draw.index + list * draw.capacity;
    int candidates = wanted > 0 ? draw.found[list] : 0, stride = gridDim.x * THREADS;
    if (candidates < wanted || candidates > draw.capacity) {  // the same in all threads of these blocks
        if (blockIdx.x > 0) return;
        match_select(draw, image, kind, wanted, keys, index);
        candidates = wanted;
        stride = THREADS;
    }
    const int first = blockIdx.x * THREADS + threadIdx.x;
    for (int i = first; i < candidates; i += stride) {
        const MatchKey key = keys[i];
        int rank = 0;
        for (int j = 0; j < candidates; ++j) rank += keys[j] < key;
        if (rank < wanted) write(before + rank, 1 - kind, index[i]);
    }
    if (kind == 1)
        for (int slot = before + wanted + first; slot < draw.size; slot += stride) write(slot, -1, 0);
}

// Deltas from a box to the ground truth of its state; zeros without one.
__device__ __forceinline__ float4 match_deltas(const Box& b, const Box& t, int label, float wx, float wy, float ww,
                                               float wh) {
    return label == 1 ? box_encode(b, t, wx, wy, ww, wh) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// anchors (count, 4); index_out and labels_out (B, size); deltas_out (B, size, 4).
extern "C" __global__ void __launch_bounds__(THREADS)
    match_draw_anchors(const int* __restrict__ state, int count, const int* __restrict__ tally, int size, int positives,
                       const int* __restrict__ found, int capacity, MatchKey origin,
                       const long long* __restrict__ step, const long long* __restrict__ image_ids, MatchKey* keys,
                       int* index, const float* __restrict__ anchors, const float* __restrict__ gt_boxes,
                       long long* __restrict__ index_out, long long* __restrict__ labels_out,
                       float4* __restrict__ deltas_out) {
    __shared__ int total;
    const int image = blockIdx.z;
    const MatchDraw draw = {state,  count, tally,     size, positives, found, capacity,
                            origin, step,  image_ids, keys, index,     &total};
    match_draw(draw, image, [&](int slot, int label, int i) {
        const int out = image * size + slot;
        Box b = {0.0f, 0.0f, 0.0f, 0.0f}, t = b;
        if (label == 1) {
            b = load_box(anchors, i);
            t = load_box(gt_boxes, state[image * count + i]);
        }
        index_out[out] = i;
        labels_out[out] = label;
        deltas_out[out] = match_deltas(b, t, label, 1.0f, 1.0f, 1.0f, 1.0f);
    });
}

// proposals (B, candidates, 4); rois (B * size, 5); labels and weights (B * size); matched and deltas (B * size, 4).
extern "C" __global__ void __launch_bounds__(THREADS)
    match_draw_proposals(const int* __restrict__ state, int count, const int* __restrict__ tally, int size,
                         int positives, const int* __restrict__ found, int capacity, MatchKey origin,
                         const long long* __restrict__ step, const long long* __restrict__ image_ids, MatchKey* keys,
                         int* index, const float* __restrict__ proposals, int rows_in, const float* __restrict__ gt_boxes,
                         const long long* __restrict__ gt_labels, const long long* __restrict__ gt_offsets, int rows,
                         float wx, float wy, float ww, float wh, float* __restrict__ rois,
                         long long* __restrict__ labels, float* __restrict__ matched, float4* __restrict__ deltas,
                         float* __restrict__ weights) {
    __shared__ int total;
    const int image = blockIdx.z;
    const int first = match_truth(gt_boxes, gt_labels, gt_offsets, rows, image).first;
    const MatchDraw draw = {state,  count, tally,     size, positives, found, capacity,
                            origin, step,  image_ids, keys, index,     &total};
    match_draw(draw, image, [&](int slot, int label, int i) {
        const int out = image * size + slot;
        Box b = {0.0f, 0.0f, 0.0f, 0.0f}, t = b;
        if (label >= 0) b = match_candidate(proposals, rows_in, gt_boxes, first, image, i);
        const int row = label == 1 ? state[image * count + i] : 0;
        if (label == 1) t = load_box(gt_boxes, row);
        float* roi = rois + 5 * out;
        roi[0] = static_cast<float>(image);
        roi[1] = b.x1;
        roi[2] = b.y1;
        roi[3] = b.x2;
        roi[4] = b.y2;
        labels[out] = label == 1 ? gt_labels[row] : label;
        store_box(matched, out, t);
        deltas[out] = match_deltas(b, t, label, wx, wy, ww, wh);
        weights[out] = label >= 0 ? 1.0f : 0.0f;
    });
}
