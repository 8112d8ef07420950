// Proposals: the best anchors of every level and image, decoded, and the levels merged after NMS.
//
// objectness (B, N), deltas (B, N, 4) of the storage type; anchors (N, 4). The N anchors are L levels one after
// another, which end at end0, end1, ...; ends that are not used equal N. A segment is a level of an image, Q = B * L of
// them. From each, M anchors are selected, or all that are finite.
//
//   count_digits     grid (tiles of an image, B), once per digit from the highest: a radix select. Each block finds the
//                    digits that are settled from the histograms of the launches before, and counts the next digit of
//                    the logits that begin with them. A tile is TILE anchors of one level.
//   collect_anchors  same grid: the last digit is settled, too, so that the key of the last anchor to select is known.
//                    Writes the keys of the selected anchors, in any order.
//   decode_anchors   grid (Q, ceil(M / THREADS)): sorted keys to boxes, clipped to their image.
//   merge_levels     grid (ceil(max(L * R, P) / THREADS), B): up to R kept boxes of every level to P rows per image.
//
// Anchors are ordered by (score, lower index). Scores are compared as integers that rise with them. The logits stay in
// the L2 cache from one launch to the next; nothing as long as N is written.

#include "scalar.cuh"
#include "box.cuh"

// Bits of a key, highest first, that are counted by one launch. Every value of a 16-bit type differs in the upper 19
// bits of its float32, so two launches settle it.
constexpr int KEY_BITS = sizeof(scalar) == 4 ? 32 : 20;
constexpr int DIGIT_BITS = sizeof(scalar) == 4 ? 11 : 10;
constexpr int DIGITS = sizeof(scalar) == 4 ? 3 : 2;
constexpr int BINS = 1 << DIGIT_BITS;
constexpr int LAST_BINS = 1024;
constexpr int ROUNDS = TILE / THREADS;
constexpr int WARPS = THREADS / 32;
static_assert(TILE % THREADS == 0 && BINS % THREADS == 0, "a thread owns as many anchors and bins as any other");
static_assert(KEY_BITS - (DIGITS - 1) * DIGIT_BITS == 10, "the last digit has LAST_BINS values");

// Lowest bit of a digit, and how many bits it has.
__device__ __forceinline__ int digit_shift(int digit) {
    return max(KEY_BITS - (digit + 1) * DIGIT_BITS, 0);
}

__device__ __forceinline__ int digit_bits(int digit) {
    return min(KEY_BITS - digit * DIGIT_BITS, DIGIT_BITS);
}

// Rises with x; -0 equals 0; 0 for NaN and infinity, which no finite number gives. Without a branch, so that the loads
// of several x are in flight together.
__device__ __forceinline__ unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned key = bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
    return is_finite(x) ? key : 0u;
}

// Where a tile lies.
struct Tile {
    int level, first, end;  // anchors of the image, the end excluded
    int index;              // among the tiles of its level
};

__device__ __forceinline__ Tile find_tile(const int (&ends)[LEVELS]) {
    Tile tile = {0, 0, 0, static_cast<int>(blockIdx.x)};
    bool found = false;
    int start = 0;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        const int tiles = (ends[level] - start + TILE - 1) / TILE;
        if (!found && tile.index < tiles) {
            tile.level = level;
            tile.first = start + tile.index * TILE;
            tile.end = min(tile.first + TILE, ends[level]);
            found = true;
        } else if (!found) {
            tile.index -= tiles;
        }
        start = ends[level];
    }
    return tile;
}

// What is known of the key of the last anchor to select.
struct Pivot {
    unsigned prefix;  // its upper digits
    int missing;      // anchors still to select among those that begin with them
    bool everything;  // there are fewer finite scores than asked for: all of them are selected
};

// Settle the first digits from their histograms (DIGITS, BINS). All threads of the block call it and get the same.
// `totals` is shared memory; the caller may use it again when the function is done.
__device__ __forceinline__ Pivot find_pivot(const int* __restrict__ histograms, int digits, int capacity,
                                            int (&totals)[WARPS + 2]) {
    constexpr int OWN = BINS / THREADS;
    int* chosen = totals + WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Pivot pivot = {0u, capacity, false};
    for (int digit = 0; digit < digits; ++digit) {
        // Thread t owns the bins from `top` downwards, so that a scan over threads counts from the highest bin.
        const int top = BINS - 1 - static_cast<int>(threadIdx.x) * OWN;
        int own = 0;
        for (int j = 0; j < OWN; ++j) own += histograms[digit * BINS + top - j];
        int upto = own;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, upto, step);
            if (lane >= step) upto += other;
        }
        if (lane == 31) totals[warp] = upto;
        if (threadIdx.x == 0) chosen[0] = -1;
        __syncthreads();
        for (int w = 0; w < warp; ++w) upto += totals[w];
        int above = upto - own;
        if (above < pivot.missing && upto >= pivot.missing) {
            int reached = top;
            while (above + histograms[digit * BINS + reached] < pivot.missing) {
                above += histograms[digit * BINS + reached--];
            }
            chosen[0] = reached;
            chosen[1] = pivot.missing - above;
        }
        __syncthreads();
        const int bin = chosen[0];
        pivot.missing = chosen[1];
        __syncthreads();  // the next digit, or the caller, overwrites what was read here
        if (bin < 0) return {0u, 0, true};  // of the first digit only
        pivot.prefix = pivot.prefix << digit_bits(digit) | static_cast<unsigned>(bin);
    }
    return pivot;
}

extern "C" __global__ void __launch_bounds__(THREADS)
count_digits(const scalar* __restrict__ objectness, int* __restrict__ histograms, int* __restrict__ ties, int digit,
             int capacity, int anchors, int levels, int end0, int end1, int end2, int end3, int end4, int end5,
             int end6, int end7) {
    __shared__ int counts[BINS], totals[WARPS + 2];
    const Tile tile = find_tile({end0, end1, end2, end3, end4, end5, end6, end7});
    histograms += (blockIdx.y * levels + tile.level) * (DIGITS * BINS);
    const Pivot pivot = find_pivot(histograms, digit, capacity, totals);
    if (pivot.everything) return;  // the whole block
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) counts[bin] = 0;
    __syncthreads();
    const int shift = digit_shift(digit), bits = digit_bits(digit);
    objectness += static_cast<long long>(blockIdx.y) * anchors;
    unsigned key[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = tile.first + round * THREADS + threadIdx.x;
        const unsigned whole = order_key(to_float(objectness[min(i, tile.end - 1)]));
        key[round] = i < tile.end ? whole >> (32 - KEY_BITS) : 0u;
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        // In two steps, because the first digit leaves no bit above it.
        const unsigned upper = key[round] >> shift, prefix = upper >> (bits - 1) >> 1;
        if (key[round] != 0u && prefix == pivot.prefix) atomicAdd(&counts[upper & ((1u << bits) - 1)], 1);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (counts[bin] != 0) atomicAdd(&histograms[digit * BINS + bin], counts[bin]);
        // The tie rule needs to know how often each tile has the key of the last anchor.
        if (digit == DIGITS - 1 && bin < LAST_BINS) {
            ties[(blockIdx.y * gridDim.x + blockIdx.x) * LAST_BINS + bin] = counts[bin];
        }
    }
}

// Every key above the pivot, and of those equal to it the first ones by index.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
collect_anchors(const scalar* __restrict__ objectness, const int* __restrict__ histograms,
                const int* __restrict__ ties, long long* __restrict__ keys, long long* __restrict__ selected,
                int capacity, int anchors, int levels, int end0, int end1, int end2, int end3, int end4, int end5,
                int end6, int end7) {
    __shared__ int earlier, totals[WARPS + 2];
    const Tile tile = find_tile({end0, end1, end2, end3, end4, end5, end6, end7});
    const int segment = blockIdx.y * levels + tile.level;
    const Pivot pivot = find_pivot(histograms + segment * (DIGITS * BINS), DIGITS, capacity, totals);
    if (threadIdx.x == 0) earlier = 0;
    __syncthreads();
    if (!pivot.everything) {
        const int last = blockIdx.y * gridDim.x + blockIdx.x, bin = pivot.prefix & (LAST_BINS - 1);
        int count = 0;
        for (int t = last - tile.index + threadIdx.x; t < last; t += THREADS) count += ties[t * LAST_BINS + bin];
        if (count != 0) atomicAdd(&earlier, count);
    }

    // A warp takes its anchors in the order of their index: its first 32, then its next 32, and so on.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = tile.first + warp * (ROUNDS * 32) + lane;
    unsigned score[ROUNDS];
    int equal_count = 0;
    objectness += static_cast<long long>(blockIdx.y) * anchors;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = first + round * 32;
        const unsigned whole = order_key(to_float(objectness[min(i, tile.end - 1)]));
        score[round] = i < tile.end ? whole : 0u;
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        equal_count += __popc(__ballot_sync(0xffffffffu, score[round] >> (32 - KEY_BITS) == pivot.prefix));
    }
    if (lane == 0) totals[warp] = equal_count;
    __syncthreads();
    int rank = earlier;
    for (int w = 0; w < warp; ++w) rank += totals[w];

    const unsigned below = (1u << lane) - 1;
    unsigned taken = 0;  // a bit per round
    int total = 0;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const unsigned key = score[round] >> (32 - KEY_BITS);
        const unsigned equal = __ballot_sync(0xffffffffu, key == pivot.prefix);
        const bool take = key > pivot.prefix || (key == pivot.prefix && rank + __popc(equal & below) < pivot.missing);
        taken |= static_cast<unsigned>(take) << round;
        total += __popc(__ballot_sync(0xffffffffu, take));
        rank += __popc(equal);
    }
    if (total == 0) return;  // the whole warp
    unsigned long long start = 0;
    if (lane == 0) {
        start = atomicAdd(reinterpret_cast<unsigned long long*>(selected + segment),
                          static_cast<unsigned long long>(total));
    }
    int slot = __shfl_sync(0xffffffffu, static_cast<int>(start), 0);
    keys += static_cast<long long>(segment) * capacity;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const bool take = taken >> round & 1u;
        const unsigned others = __ballot_sync(0xffffffffu, take);
        if (take) {
            // As a signed number: falling score, then rising index.
            const unsigned high = score[round] ^ 0x80000000u, low = ~static_cast<unsigned>(first + round * 32);
            keys[slot + __popc(others & below)] =
                static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low);
        }
        slot += __popc(others);
    }
}

// A box that is not finite or too small becomes NaN: NMS never keeps it, and the rows need not be moved together.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_anchors(const scalar* __restrict__ objectness, const scalar* __restrict__ deltas,
               const float* __restrict__ anchors, const float* __restrict__ image_sizes,
               const long long* __restrict__ keys, const long long* __restrict__ selected, float* __restrict__ boxes,
               float* __restrict__ scores, int capacity, int anchor_count, int levels, float min_size) {
    const int segment = blockIdx.x, image = segment / levels;
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= selected[segment]) return;
    const int row = segment * capacity + i;
    const int anchor = static_cast<int>(~static_cast<unsigned>(keys[row]));
    const int source = image * anchor_count + anchor;
    const scalar* delta = deltas + 4ll * source;
    const Box decoded = box_decode(to_float(delta[0]), to_float(delta[1]), to_float(delta[2]), to_float(delta[3]),
                                   load_box(anchors, anchor), 1.0f, 1.0f, 1.0f, 1.0f);
    Box box = box_clip(decoded, image_sizes[2 * image], image_sizes[2 * image + 1]);
    // The area is finite only if all coordinates are; clipping would hide that they were not.
    if (!(is_finite(box_area(decoded)) && box.x2 - box.x1 >= min_size && box.y2 - box.y1 >= min_size)) {
        box.x1 = __uint_as_float(0x7fc00000u);
    }
    store_box(boxes, row, box);
    scores[row] = to_float(objectness[source]);
}

// A box's place is its place in its level and the number of boxes in every other level that come before it. All levels
// are searched at once, for a search is a chain of loads that wait for each other.
extern "C" __global__ void __launch_bounds__(THREADS)
merge_levels(const float* __restrict__ boxes, const float* __restrict__ scores, const long long* __restrict__ keep,
             const long long* __restrict__ kept, float* __restrict__ out_boxes, float* __restrict__ out_scores,
             long long* __restrict__ out_count, int capacity, int rows, int levels, int proposals) {
    const int i = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * levels;
    int total = 0;
    for (int level = 0; level < levels; ++level) total += static_cast<int>(kept[first + level]);
    total = min(total, proposals);
    if (i == 0) out_count[blockIdx.y] = total;
    if (i >= total && i < proposals) {
        store_box(out_boxes, blockIdx.y * proposals + i, {0.0f, 0.0f, 0.0f, 0.0f});
        out_scores[blockIdx.y * proposals + i] = 0.0f;
    }
    const int level = i / rows;
    if (level >= levels) return;
    const int segment = first + level;
    int place = i % rows;
    if (place >= kept[segment]) return;
    const int row = segment * capacity + static_cast<int>(keep[segment * rows + place]);
    const float score = scores[row];
    int low[LEVELS], high[LEVELS];
    bool open = false;
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) {
        low[other] = 0;
        high[other] = other < levels && other != level ? static_cast<int>(kept[first + other]) : 0;
        open |= high[other] > 0;
    }
    while (open) {
        int middle[LEVELS], at[LEVELS];
        float found[LEVELS];
#pragma unroll
        for (int other = 0; other < LEVELS; ++other) {
            middle[other] = (low[other] + high[other]) / 2;
            const int of = first + min(other, levels - 1);
            at[other] = of * capacity + static_cast<int>(keep[of * rows + min(middle[other], rows - 1)]);
        }
#pragma unroll
        for (int other = 0; other < LEVELS; ++other) found[other] = scores[at[other]];
        open = false;
#pragma unroll
        for (int other = 0; other < LEVELS; ++other) {
            if (low[other] >= high[other]) continue;
            // At equal score the lower level comes first.
            if (found[other] > score || (other < level && found[other] == score)) {
                low[other] = middle[other] + 1;
            } else {
                high[other] = middle[other];
            }
            open |= low[other] < high[other];
        }
    }
#pragma unroll
    for (int other = 0; other < LEVELS; ++other) place += low[other];
    if (place < proposals) {
        store_box(out_boxes, blockIdx.y * proposals + place, load_box(boxes, row));
        out_scores[blockIdx.y * proposals + place] = score;
    }
}
