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
// Boxes are compared in tiles (matching.cuh), with the few rows that a tile could have an IoU with that matters. There
// is no matrix: match_reach and match_assign compute the same IoU twice, to the same bits, which for those rows is
// cheaper than writing even one float per anchor.
//
// Boxes are read, 16 bytes each, and not computed from level and cell: all images share the reads through the L2 cache,
// and the same kernels serve match() and proposals.
//
// Memory beside the outputs: `state`, 4 bytes per box; `reach`, 4 per row; the lists, 12 for each place.
// Source: the rules of torchvision's Matcher, with the differences that rcnn/kernels/matching.py names.

#include "box.cuh"
#include "matching.cuh"

// State of a box: its ground-truth row, or one of these.
#define NEGATIVE (-1)
#define IGNORED (-2)
// An IoU that most rows of ground truth reach with some anchor, and one that none does.
#define LIKELY 0.25f
#define NEVER 2.0f

typedef unsigned long long MatchKey;

// What an anchor may not cross: `border` beyond the image. Without sizes the border is infinite: all take part.
__device__ __forceinline__ Box match_frame(const float* sizes, int image, float border) {
    const float height = sizes ? sizes[2 * image] : 0.0f, width = sizes ? sizes[2 * image + 1] : 0.0f;
    return {-border, -border, width + border, height + border};
}

__device__ __forceinline__ bool match_inside(const Box& frame, const Box& b) {
    return !(b.x1 < frame.x1 || b.y1 < frame.y1 || b.x2 > frame.x2 || b.y2 > frame.y2);
}

// The row with the largest IoU with a box, which overlaps one: the lowest of equal ones. All lanes give the same box.
__device__ __forceinline__ int match_best_row(const Box& b, const MatchTruth& truth) {
    const float area = box_area(b);
    float most = 0.0f;
    int best = INT_LIMIT;
    for (int row = truth.first + threadIdx.x % 32; row < truth.last; row += 32) {
        const Box t = load_box(truth.boxes, row);
        const float t_area = box_area(t), iou = box_iou(b, area, t, t_area);
        if (truth.labels[row] > 0 && is_finite(t_area) && iou > most) {
            most = iou;
            best = row;
        }
    }
    return INT_LIMIT - match_warp_max(match_warp_max(most) == most ? INT_LIMIT - best : 0);
}

// Writes the state of the boxes of a tile, and counts positives and negatives of the image in `tally`, by way of
// `totals`, two places in shared memory. Called by the whole block.
//
// An IoU matters from `low` on, or if it is what the row reaches: rows are looked at from the lower of these. The best
// row of a box that is raised with less than `low` may not have been; the warp then finds it among all of them.
template <int N>
__device__ __forceinline__ void match_states(const MatchTile<N>& tile, const MatchTruth& truth, int block, int count,
                                             const int* reach, float high, float low, int* state, int* tally,
                                             int* totals) {
    if (threadIdx.x < 2) totals[threadIdx.x] = 0;
    float best[N];
    int row[N];
    unsigned raised = 0, covered = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        best[e] = 0.0f;
        row[e] = NEGATIVE;
    }
    match_meetings(
        tile, truth,
        [&](int other, bool) {
            const float reached = reach ? __int_as_float(reach[other]) : 0.0f;
            return reached > 0.0f ? fminf(reached, low) : low;
        },
        [&](int other, const Box& t, float area, float fraction, bool ignore) {
            unsigned near = 0;
#pragma unroll
            for (int e = 0; e < N; ++e) {
                const Box b = load_box(tile.boxes, match_slot(e));
                const float inter = box_intersection(b, t), own = box_area(b);
                if (ignore) {  // the same in all lanes
                    covered |= static_cast<unsigned>(inter > 0.0f && inter >= 0.5f * own) << e;
                } else {
                    near |= static_cast<unsigned>(inter > (own + area) * fraction) << e;
                }
            }
            for (; near; near &= near - 1) {
                const int slot = __ffs(static_cast<int>(near)) - 1;
                const Box b = load_box(tile.boxes, match_slot(slot));
                const float iou = box_iou(b, box_area(b), t, area);
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    if (e == slot && iou > best[e]) {  // rows come rising: the lowest wins a tie
                        best[e] = iou;
                        row[e] = other;
                    }
                }
                if (reach && iou > 0.0f && iou == __int_as_float(reach[other])) raised |= 1u << slot;
            }
        });
    unsigned unsure = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) unsure |= static_cast<unsigned>(best[e] < low) << e;
    unsure &= raised;
    for (unsigned lanes; (lanes = __ballot_sync(WARP_MASK, unsure != 0)) != 0;) {
        __syncwarp();  // a lane reads the box of another
        const int source = __ffs(static_cast<int>(lanes)) - 1;
        const int slot = __ffs(static_cast<int>(__shfl_sync(WARP_MASK, unsure, source))) - 1;
        const Box b = load_box(tile.boxes, slot * THREADS + threadIdx.x / 32 * 32 + source);
        const int found = match_best_row(b, truth);
        if (threadIdx.x % 32 != source) continue;
#pragma unroll
        for (int e = 0; e < N; ++e)
            if (e == slot) row[e] = found;
        unsure &= unsure - 1;
    }
    int positives = 0, negatives = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
        int value = IGNORED;
        if (tile.in_use >> e & 1u) {
            if (best[e] >= high || (raised >> e & 1u)) value = row[e];
            else if (best[e] < low && !(covered >> e & 1u)) value = NEGATIVE;
        }
        if (match_index<N>(block, e) < count) state[match_index<N>(block, e)] = value;
        positives += __popc(__ballot_sync(WARP_MASK, value >= 0));
        negatives += __popc(__ballot_sync(WARP_MASK, value == NEGATIVE));
    }
    if (!tally) return;  // the whole block
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        atomicAdd(totals, positives);
        atomicAdd(totals + 1, negatives);
    }
    __syncthreads();
    if (threadIdx.x < 2 && totals[threadIdx.x]) atomicAdd(tally + threadIdx.x, totals[threadIdx.x]);
}

// Blocks in the order in which they start: those of all images in turns, from the last anchors on. These are the
// coarsest, whose tiles meet most rows: nobody waits for them in the end, and what they reach spares finer ones work.
struct MatchBlock {
    int image, block;
};

__device__ __forceinline__ MatchBlock match_block() {
    const unsigned started = blockIdx.y * gridDim.x + blockIdx.x;
    return {static_cast<int>(started % gridDim.y), static_cast<int>(gridDim.x - 1 - started / gridDim.y)};
}

// boxes (count, 4), those of image b from b * stride on; sizes (B, 2) or null; reach (rows) starts as 0.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    match_reach(const float* __restrict__ boxes, int stride, int count, const float* __restrict__ sizes, float border,
                const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                const long long* __restrict__ gt_offsets, int rows, int* reach) {
    __shared__ float4 tile_boxes[EACH * THREADS];
    const MatchBlock at = match_block();
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, at.image);
    const Box frame = match_frame(sizes, at.image, border);
    const MatchTile<EACH> tile = match_tile<EACH>(tile_boxes, at.block, count, [&](int i, Box& b) {
        b = load_box(boxes, at.image * stride + i);
        return match_inside(frame, b);
    });
    // The first tiles do not know yet what a row reaches, and few rows end below LIKELY. So smaller IoUs wait for a
    // second look, at rows that are still below it.
    bool unsure = false;
    for (bool again = false;; again = true) {
        match_meetings(
            tile, truth,
            [&](int row, bool meets) {
                if (!meets) return NEVER;
                const float reached = __int_as_float(atomicMax(reach + row, 0));  // other blocks raise it
                if (reached < LIKELY) unsure = true;
                return !again ? fmaxf(reached, LIKELY) : reached < LIKELY ? reached : NEVER;
            },
            [&](int row, const Box& t, float area, float fraction, bool ignore) {
                if (ignore) return;  // the same in all lanes
                float inter[EACH], sum[EACH], most = 0.0f, most_sum = 0.0f;
                bool near = false;
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const Box b = load_box(tile.boxes, match_slot(e));
                    inter[e] = box_intersection(b, t);
                    sum[e] = box_area(b) + area;
                    near |= inter[e] > sum[e] * fraction;
                    if (inter[e] > most) {
                        most = inter[e];
                        most_sum = sum[e];
                    }
                }
                if (!__any_sync(WARP_MASK, near)) return;
                // Where areas are alike, the largest intersection has the largest IoU. An intersection over its sum is
                // IoU / (1 + IoU): the quick test with that of this box finds all whose IoU is as large (the two more
                // roundings are within the 64e), mostly one, and only they are divided.
                const float widest = match_warp_max(most);
                const int owner = __ffs(static_cast<int>(__ballot_sync(WARP_MASK, most == widest))) - 1;
                const float part = widest / __shfl_sync(WARP_MASK, most_sum, owner) * (1.0f - 0x1p-18f);
                const float least = part < 1e-18f || area * part < 1e-30f ? 0.0f : part;
                unsigned nearest = 0;
#pragma unroll
                for (int e = 0; e < EACH; ++e) nearest |= static_cast<unsigned>(inter[e] > sum[e] * least) << e;
                float iou = 0.0f;
                for (; nearest; nearest &= nearest - 1) {
                    const Box b = load_box(tile.boxes, match_slot(__ffs(static_cast<int>(nearest)) - 1));
                    iou = fmaxf(iou, box_iou(b, box_area(b), t, area));
                }
                const int bits = match_warp_max(__float_as_int(iou));  // not negative: bits order as integers
                if (bits > 0 && threadIdx.x % 32 == 0) atomicMax(reach + row, bits);
            });
        if (again || !__any_sync(WARP_MASK, unsure)) break;
    }
}

// As above; reach may be null; state (B, count); tally (B, 2) starts as 0, or is null.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    match_assign(const float* __restrict__ boxes, int stride, int count, const float* __restrict__ sizes, float border,
                 const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                 const long long* __restrict__ gt_offsets, int rows, const int* __restrict__ reach, float high,
                 float low, int* __restrict__ state, int* tally) {
    __shared__ float4 tile_boxes[EACH * THREADS];
    __shared__ int totals[2];
    const MatchBlock at = match_block();
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, at.image);
    const Box frame = match_frame(sizes, at.image, border);
    const MatchTile<EACH> tile = match_tile<EACH>(tile_boxes, at.block, count, [&](int i, Box& b) {
        b = load_box(boxes, at.image * stride + i);
        return match_inside(frame, b);
    });
    match_states(tile, truth, at.block, count, reach, high, low, state + at.image * count,
                 tally ? tally + 2 * at.image : nullptr, totals);
}

// Candidate i of an image: proposal i, or from `capacity` on the ground truth of the image.
__device__ __forceinline__ Box match_candidate(const float* proposals, int capacity, const float* gt_boxes, int first,
                                               int image, int i) {
    return i < capacity ? load_box(proposals, image * capacity + i) : load_box(gt_boxes, first + i - capacity);
}

// proposals (B, capacity, 4), of which in_use (B) are proposals; count = capacity + rows, enough for any image.
extern "C" __global__ void __launch_bounds__(THREADS, 10)
    match_assign_proposals(const float* __restrict__ proposals, const long long* __restrict__ in_use, int capacity,
                           int count, const float* __restrict__ gt_boxes, const long long* __restrict__ gt_labels,
                           const long long* __restrict__ gt_offsets, int rows, float high, float low,
                           int* __restrict__ state, int* tally) {
    __shared__ float4 tile_boxes[THREADS];
    __shared__ int totals[2];
    const int image = blockIdx.y;
    const MatchTruth truth = match_truth(gt_boxes, gt_labels, gt_offsets, rows, image);
    const MatchTile<1> tile = match_tile<1>(tile_boxes, blockIdx.x, count, [&](int i, Box& b) {
        const int row = truth.first + i - capacity;
        if (i < capacity ? i >= in_use[image] : row >= truth.last) return false;
        b = match_candidate(proposals, capacity, gt_boxes, truth.first, image, i);
        return i < capacity || (gt_labels[row] > 0 && b.x2 > b.x1 && b.y2 > b.y1 && is_finite(box_area(b)));
    });
    match_states(tile, truth, blockIdx.x, count, nullptr, high, low, state + image * count, tally + 2 * image,
                 totals);
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
    const int image = blockIdx.y, first = blockIdx.x * EACH * THREADS + threadIdx.x;
    int kinds[EACH];  // read while the first thread works out the start
#pragma unroll
    for (int e = 0; e < EACH; ++e)
        kinds[e] = first + e * THREADS < count ? match_kind(state[image * count + first + e * THREADS]) : 2;
    if (threadIdx.x == 0) start = match_start(origin, step, image_ids, image);
    if (threadIdx.x < 2) {
        const int n = tally[2 * image + threadIdx.x];
        limits[threadIdx.x] = n <= capacity ? ~0ull : static_cast<MatchKey>(expected / n * 18446744073709551616.0f);
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int i = first + e * THREADS, kind = kinds[e];
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
// place of a row is the number of smaller keys in its list, so nothing is sorted; RANKERS lanes count a share each.
// Blocks in y: the two kinds.
template <class Write>
__device__ __forceinline__ void match_draw(const MatchDraw& draw, int image, Write write) {
    const int kind = blockIdx.y, list = 2 * image + kind;
    const int positives = min(draw.tally[2 * image], draw.positives);
    const int before = kind == 0 ? 0 : positives;
    const int wanted = kind == 0 ? positives : min(draw.tally[list], draw.size - positives);
    MatchKey* keys = draw.keys + list * draw.capacity;
    int* index = draw.index + list * draw.capacity;
    int candidates = wanted > 0 ? draw.found[list] : 0, blocks = gridDim.x;
    if (candidates < wanted || candidates > draw.capacity) {  // the same in all threads of these blocks
        if (blockIdx.x > 0) return;
        match_select(draw, image, kind, wanted, keys, index);
        candidates = wanted;
        blocks = 1;
    }
    const int thread = blockIdx.x * THREADS + threadIdx.x, share = threadIdx.x % RANKERS;
    for (int base = thread / 32 * (32 / RANKERS); base < candidates; base += blocks * THREADS / RANKERS) {
        const int i = base + threadIdx.x % 32 / RANKERS, mine = min(i, candidates - 1);
        const MatchKey key = keys[mine];
        const int at = index[mine];
        int rank = 0;
#pragma unroll 8
        for (int j = share; j < candidates; j += RANKERS) rank += keys[j] < key;
        for (int step = RANKERS / 2; step > 0; step /= 2) rank += __shfl_xor_sync(WARP_MASK, rank, step);
        if (share == 0 && i < candidates && rank < wanted) write(before + rank, 1 - kind, at);
    }
    if (kind == 1)
        for (int slot = before + wanted + thread; slot < draw.size; slot += blocks * THREADS) write(slot, -1, 0);
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
