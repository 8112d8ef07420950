// RoI Align on the device: forward, and a backward that gives the same bits in every run.
//
// roi_align_forward   grid (R, parts), block THREADS: a block cuts out a part of one region's output. Which level the
//                     region lies on, and which cells its bins read along each axis with which weights, is worked out
//                     once per block in shared memory, with cells that several samples share merged; then each thread
//                     sums 16 bytes of channels of a bin (channels-last), or one value (otherwise).
// roi_align_sort      grid B * L, block SORT: the regions of each level of each image, see regions.cuh.
// roi_align_backward  grid (tiles of all levels, slices of channels), block THREADS: a block owns TILE x TILE cells of
//                     LANES packs of channels in registers and adds what its regions send there, region after region.
//
// Layouts: maps (B, C, H, W) and outputs (R, C, oh, ow), all of them channels-last (last = 1) or all contiguous.
// regions (R, 5) float32: image, x1, y1, x2, y2. A region that names no image or is not finite gives zeros and
// sends nothing. With `vector`, C is a multiple of a pack and all pointers lie on 16-byte boundaries.
// Positions have the bits of the CPU body (same order of operations, no fused multiply-add), so both choose the same
// cells; the sums use fmaf.
// Source: He et al., Mask R-CNN (2017), section 3; Lin et al., Feature Pyramid Networks (2017), equation 1.

#include "box.cuh"
#include "regions.cuh"
#include "scalar.cuh"

static_assert(TILE == 8, "a thread has half a column of a tile, which a float4 of weights covers");
static_assert(THREADS == LANES * TILE * 2, "a block has a thread for each pack, column and half of a tile's rows");

#define LEVEL(n) scalar *map##n, int height##n, int width##n, float scale##n
#define LEVEL_PARAMETERS \
    LEVEL(0), LEVEL(1), LEVEL(2), LEVEL(3), LEVEL(4), LEVEL(5), LEVEL(6), LEVEL(7), int levels, float finest, \
        float coarsest, float canonical_scale, float canonical_level
#define LEVEL_VALUE(n) {map##n, height##n, width##n, scale##n}
#define LEVEL_VALUES                                                                                       \
    {LEVEL_VALUE(0), LEVEL_VALUE(1), LEVEL_VALUE(2), LEVEL_VALUE(3), LEVEL_VALUE(4), LEVEL_VALUE(5), \
     LEVEL_VALUE(6), LEVEL_VALUE(7)}

struct Level {
    scalar* map;
    int height, width;
    float scale;
};

// The pyramid, whose arrays stay in registers because all loops over them are unrolled.
struct Pyramid {
    Level level[8];
    int levels;
    float finest, coarsest;  // level k has scale 2 ** -k
    float canonical_scale, canonical_level;
};

__device__ __forceinline__ Level pick(const Pyramid& pyramid, int number) {
    Level level = pyramid.level[0];
#pragma unroll
    for (int i = 1; i < 8; i++)
        if (i == number) level = pyramid.level[i];
    return level;
}

// How many samples a bin has along an axis and where.
struct Axis {
    float start, step;
    int samples, size;
};

// Two cells that a sample lies between, with their weights.
struct Sample {
    int before, after;
    float weight_before, weight_after;
};

__device__ __forceinline__ Axis make_axis(float low, float high, float scale, int size, int bins, int sampling_ratio,
                                          int aligned) {
    const float offset = aligned ? 0.5f : 0.0f;
    Axis axis;
    axis.start = low * scale - offset;
    float extent = (high * scale - offset) - axis.start;
    if (!aligned) extent = fmaxf(extent, 1.0f);
    axis.step = extent / static_cast<float>(bins);
    // At most 2 ** 30: bins of more cells are sampled at larger distances.
    const float adaptive = fminf(fmaxf(ceilf(axis.step), 0.0f), 1073741824.0f);
    axis.samples = sampling_ratio > 0 ? sampling_ratio : static_cast<int>(adaptive);
    axis.size = size;
    if (!(is_finite(axis.start) && is_finite(extent))) axis.samples = 0;  // scaling made infinity of it
    return axis;
}

// Samples of a bin by rising position: a reversed region runs backwards.
__device__ __forceinline__ float position(const Axis& axis, int bin, int number) {
    const float k = static_cast<float>(axis.step < 0.0f ? axis.samples - 1 - number : number);
    return (axis.start + static_cast<float>(bin) * axis.step) + (k + 0.5f) * axis.step / static_cast<float>(axis.samples);
}

// Number of samples of a bin below a limit, or below it and at it. Positions rise, rounding included.
__device__ __forceinline__ int samples_below(const Axis& axis, int bin, float limit, bool and_at) {
    int low = 0, high = axis.samples;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        const float p = position(axis, bin, middle);
        if (p < limit || (and_at && p == limit)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// A sample in -1..size, moved onto the map.
__device__ __forceinline__ Sample sample(const Axis& axis, int bin, int number) {
    const float p = fmaxf(position(axis, bin, number), 0.0f);
    const int before = min(static_cast<int>(p), axis.size - 1), after = min(before + 1, axis.size - 1);
    const float fraction = after == before ? 0.0f : p - static_cast<float>(before);
    const float samples = static_cast<float>(axis.samples);
    return {before, after, (1.0f - fraction) / samples, fraction / samples};
}

__device__ __forceinline__ Box box_of(const float* region) {
    return {region[1], region[2], region[3], region[4]};
}

// Level of a region; -1 if it gives nothing, for its coordinates are not finite.
__device__ __forceinline__ int level_of(const Box& box, const Pyramid& pyramid) {
    if (!box_finite(box)) return -1;
    if (pyramid.levels == 1) return 0;
    const float side = sqrtf(box_area(box));
    const float level = floorf((pyramid.canonical_level + log2f(side / pyramid.canonical_scale)) + 1e-6f);
    // fmaxf drops NaN: a region reversed on one axis goes to the finest level.
    const float above = fminf(fmaxf(level, pyramid.finest), pyramid.coarsest) - pyramid.finest;
    return min(static_cast<int>(above), pyramid.levels - 1);
}

// Forward -------------------------------------------------------------------------------------------------------------

// Cells that a bin reads along an axis: `count` of the block's list from `start` on; -1: the list was full.
struct Taps {
    int start, count;
};

// A block's region and the cells that it reads. In shared memory, to spare registers.
struct Place {
    const scalar* map;  // of the region's image and level; null if the region gives zeros
    Axis y, x;
    int cells[TAPS];  // as offsets in the map
    float weights[TAPS];
    Taps taps[BINS];  // of the bins in y, then of those in x
    int used;
};

// Lists the cells of a bin. Room is taken in any order, which no sum sees.
__device__ __forceinline__ Taps list_taps(const Axis& axis, int bin, int stride, Place& place) {
    const int first = samples_below(axis, bin, -1.0f, false);
    const int end = samples_below(axis, bin, static_cast<float>(axis.size), true);
    if (first >= end) return {0, 0};
    const int width = sample(axis, bin, end - 1).after - sample(axis, bin, first).before + 1;
    const int room = min(width, 2 * min(end - first, TAPS));
    if (room > TAPS) return {0, -1};
    const int start = atomicAdd(&place.used, room);
    if (start + room > TAPS) return {0, -1};
    int count = 0, listed = -1;
    for (int number = first; number < end; number++) {
        const Sample s = sample(axis, bin, number);
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int cell = side ? s.after : s.before;
            const float weight = side ? s.weight_after : s.weight_before;
            if (cell > listed) {
                place.cells[start + count] = cell * stride;
                place.weights[start + count] = weight;
                listed = cell;
                count++;
            } else {  // cells rise, so it is the last one or the one before that
                place.weights[start + count - 1 - (listed - cell)] += weight;
            }
        }
    }
    return {start, count};
}

template <int N>
__device__ __forceinline__ void add_scaled(float (&sum)[N], const float (&value)[N], float weight) {
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = fmaf(weight, value[i], sum[i]);
}

// Adds a weighted pack of channels of the map, or one value.
template <int N>
__device__ __forceinline__ void add(float (&sum)[N], const scalar* p, float weight) {
    float value[N];
    if constexpr (N == 1) {
        value[0] = to_float(*p);
    } else {
        load16(p, value);
    }
    add_scaled(sum, value, weight);
}

// Sum of a bin without a list, sample after sample.
template <int N>
__device__ __forceinline__ void add_samples(float (&sum)[N], const scalar* p, const Axis& y, const Axis& x, int bin_y,
                                         int bin_x, int row, int column) {
    const int top = samples_below(y, bin_y, -1.0f, false);
    const int bottom = samples_below(y, bin_y, static_cast<float>(y.size), true);
    const int left = samples_below(x, bin_x, -1.0f, false);
    const int right = samples_below(x, bin_x, static_cast<float>(x.size), true);
    for (int i = top; i < bottom; i++) {
        const Sample v = sample(y, bin_y, i);
        for (int j = left; j < right; j++) {
            const Sample u = sample(x, bin_x, j);
            add(sum, p + v.before * row + u.before * column, v.weight_before * u.weight_before);
            add(sum, p + v.before * row + u.after * column, v.weight_before * u.weight_after);
            add(sum, p + v.after * row + u.before * column, v.weight_after * u.weight_before);
            add(sum, p + v.after * row + u.after * column, v.weight_after * u.weight_after);
        }
    }
}

// A block's part of a region's output, in packs of N channels.
template <int N>
__device__ __forceinline__ void align(const Place& place, scalar* output, int channels, int bins_y, int bins_x,
                                      int last) {
    const int bins = bins_y * bins_x, packs = channels / N, plane = place.y.size * place.x.size;
    const int column = last ? channels : 1, row = place.x.size * column;
    const bool empty = !place.map, listed = bins_y + bins_x <= BINS;
    const int items = packs * bins, part = (items + gridDim.y - 1) / gridDim.y;
    const int first = part * blockIdx.y, end = min(first + part, items);
    for (int item = first + threadIdx.x; item < end; item += THREADS) {
        // Neighbouring threads: channels of a bin, or bins of a channel.
        const int bin = last ? item / packs : item % bins;
        const int channel = last ? (item - bin * packs) * N : item / bins;
        const scalar* p = place.map + (last ? channel : channel * plane);
        float sum[N] = {};
        if (!empty) {
            const int bin_y = bin / bins_x, bin_x = bin - bin_y * bins_x;
            const Taps v = listed ? place.taps[bin_y] : Taps{0, -1};
            const Taps u = listed ? place.taps[bins_y + bin_x] : Taps{0, -1};
            if (v.count < 0 || u.count < 0) {
                add_samples<N>(sum, p, place.y, place.x, bin_y, bin_x, row, column);
            } else {
                for (int i = v.start; i < v.start + v.count; i++) {
                    const scalar* q = p + place.cells[i];
                    const float weight = place.weights[i];
                    for (int j = u.start; j < u.start + u.count; j++)
                        add(sum, q + place.cells[j], weight * place.weights[j]);
                }
            }
        }
        scalar* out = output + (last ? bin * channels + channel : item);
        if constexpr (N == 1) {
            *out = from_float<scalar>(sum[0]);
        } else {
            store16(out, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    roi_align_forward(LEVEL_PARAMETERS, const float* __restrict__ regions, scalar* __restrict__ output, int batch,
                      int channels, int bins_y, int bins_x, int sampling_ratio, int aligned, int last, int vector) {
    __shared__ Place place;
    if (threadIdx.x == 0) {
        const Pyramid pyramid = {LEVEL_VALUES, levels, finest, coarsest, canonical_scale, canonical_level};
        const float* region = regions + 5 * blockIdx.x;
        const Box box = box_of(region);
        const int image = region_image(region, batch), number = level_of(box, pyramid);
        const Level level = pick(pyramid, max(number, 0));
        place.y = make_axis(box.y1, box.y2, level.scale, level.height, bins_y, sampling_ratio, aligned);
        place.x = make_axis(box.x1, box.x2, level.scale, level.width, bins_x, sampling_ratio, aligned);
        const bool empty = image < 0 || number < 0 || place.y.samples == 0 || place.x.samples == 0;
        place.map = empty ? nullptr : level.map + image * channels * level.height * level.width;
        place.used = 0;
    }
    __syncthreads();
    if (place.map && bins_y + bins_x <= BINS) {
        const int column = last ? channels : 1, row = place.x.size * column;
        for (int i = threadIdx.x; i < bins_y + bins_x; i += THREADS) {
            place.taps[i] = i < bins_y ? list_taps(place.y, i, row, place)
                                       : list_taps(place.x, i - bins_y, column, place);
        }
    }
    __syncthreads();
    scalar* out = output + blockIdx.x * (channels * bins_y * bins_x);
    if (vector) {
        align<Pack<scalar>::size>(place, out, channels, bins_y, bins_x, last);
    } else {
        align<1>(place, out, channels, bins_y, bins_x, last);
    }
}

// Backward ------------------------------------------------------------------------------------------------------------

// Cells of an axis from the lowest sample to the highest; the lowest is above the highest if all are off the map.
// Positions rise from sample to sample and, unless the region is reversed, from bin to bin.
__device__ __forceinline__ int2 touched_cells(const Axis& axis, int bins) {
    if (axis.samples == 0) return make_int2(0, -1);
    const bool reversed = axis.step < 0.0f;
    const float low = position(axis, reversed ? bins - 1 : 0, 0), border = static_cast<float>(axis.size);
    const float high = position(axis, reversed ? 0 : bins - 1, axis.samples - 1);
    if (high < -1.0f || low > border) return make_int2(0, -1);
    // A sample on the far border reads the last cell.
    return make_int2(min(static_cast<int>(fmaxf(low, 0.0f)), axis.size - 1),
                     static_cast<int>(fminf(fmaxf(high, 0.0f), border)) + 1);
}

extern "C" __global__ void __launch_bounds__(SORT, 1)
    roi_align_sort(LEVEL_PARAMETERS, const float* __restrict__ regions, int count, int* __restrict__ order,
                   int4* __restrict__ cells, int* __restrict__ offsets, int batch, int bins_y, int bins_x,
                   int sampling_ratio, int aligned) {
    const Pyramid pyramid = {LEVEL_VALUES, levels, finest, coarsest, canonical_scale, canonical_level};
    __shared__ int sums[SORT / 32], before;
    sort_regions<SORT>(count, order, cells, offsets, before, sums, [&](int i) -> Touched {
        const float* region = regions + 5 * i;
        const Box box = box_of(region);
        const int image = region_image(region, batch), number = level_of(box, pyramid);
        if (image < 0 || number < 0) return {-1, 0, 0, 0, 0};
        const Level level = pick(pyramid, number);
        const int2 rows = touched_cells(
            make_axis(box.y1, box.y2, level.scale, level.height, bins_y, sampling_ratio, aligned), bins_y);
        const int2 columns = touched_cells(
            make_axis(box.x1, box.x2, level.scale, level.width, bins_x, sampling_ratio, aligned), bins_x);
        return {image * levels + number, rows.x, columns.x, rows.y, columns.y};
    });
}

// Weights that one bin sends to the TILE cells from `first` on, and which of them are not 0 as bits.
__device__ __forceinline__ unsigned tile_weights(const Axis& axis, int bin, int first, float* weights) {
#pragma unroll
    for (int i = 0; i < TILE; i++) weights[i] = 0.0f;
    if (axis.samples == 0) return 0;
    // Samples between the cells before the tile and behind it; at the border of the map, all that count.
    const int begin = samples_below(axis, bin, static_cast<float>(first - 1), false);
    const int end = samples_below(axis, bin, static_cast<float>(min(first + TILE, axis.size)), true);
    for (int number = begin; number < end; number++) {
        const Sample s = sample(axis, bin, number);
        const int before = s.before - first, after = s.after - first;
        if (before >= 0 && before < TILE) weights[before] += s.weight_before;
        if (after >= 0 && after < TILE) weights[after] += s.weight_after;
    }
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < TILE; i++) bits |= weights[i] != 0.0f ? 1u << i : 0u;
    return bits;
}

// A tile and what its block knows of the regions that reach it. In shared memory, to spare registers.
struct Tile {
    Level level;
    int image, top, left;
    int list[THREADS], sums[THREADS / 32];  // regions that touch the tile, and room to count them
    // A group of regions, as many as have THREADS bins, those of both axes counted. For each: where the gradient of
    // its bins lies; the bins, as bits, that reach the upper or lower half of the tile's rows, and each column.
    int from[THREADS / 2];
    unsigned rows[THREADS / 2][2], columns[THREADS / 2][TILE];
    __align__(16) float weights[THREADS][TILE];  // that a bin sends to each row or column of the tile
};

// Finds the tile of a block: those of the first level that has a map come first.
__device__ __forceinline__ void find_tile(const Pyramid& pyramid, int batch, Tile& tile, int& segment) {
    int index = blockIdx.x, number = -1, across = 1, down = 1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const Level& level = pyramid.level[i];
        const int level_across = (level.width + TILE - 1) / TILE, level_down = (level.height + TILE - 1) / TILE;
        const int tiles = level.map ? batch * level_down * level_across : 0;
        if (number < 0 && index < tiles) number = i, across = level_across, down = level_down;
        if (number < 0) index -= tiles;
    }
    const int image = index / (down * across);
    segment = image * pyramid.levels + number;
    if (threadIdx.x == 0) {
        tile.level = pick(pyramid, number);
        tile.image = image;
        tile.top = index / across % down * TILE;
        tile.left = index % across * TILE;
    }
    __syncthreads();
}

// Blocks per multiprocessor whose registers the compiler leaves room for: without it, it spills a few.
constexpr int RESIDENT = sizeof(scalar) == 4 ? 3 : 2;

// The maps of the pyramid are written here; a level without one needs no gradient and has no tiles.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    roi_align_backward(LEVEL_PARAMETERS, const float* __restrict__ regions, const scalar* __restrict__ grad,
                       const int* __restrict__ order, const int4* __restrict__ cells, const int* __restrict__ offsets,
                       int batch, int channels, int bins_y, int bins_x, int sampling_ratio, int aligned, int last,
                       int vector) {
    constexpr int N = Pack<scalar>::size, HALF = TILE / 2;
    __shared__ Tile tile;
    int segment;
    find_tile({LEVEL_VALUES, levels, finest, coarsest, canonical_scale, canonical_level}, batch, tile, segment);
    const int bins = bins_y * bins_x, bin_stride = last ? channels : 1;
    // Neighbouring threads: channels, or columns of the map. Without packs a thread has every LANES-th channel.
    const int lane = last ? threadIdx.x % LANES : threadIdx.x / (2 * TILE);
    const int slot = last ? threadIdx.x / LANES : threadIdx.x % (2 * TILE);
    const int x = slot % TILE, half = slot / TILE;
    const int channel = blockIdx.y * LANES * N + (vector ? lane * N : lane);
    const int own = last ? channel : channel * bins, step = last ? LANES : LANES * bins;
    // A mask has 32 bits, so a region of more bins takes several turns, each like a region of its own.
    const int turn_y = min(bins_y, 32), turn_x = min(bins_x, 32), turn = turn_y + turn_x, group = THREADS / turn;
    const int turns_x = (bins_x + 31) / 32, turns = (bins_y + 31) / 32 * turns_x;
    float sum[HALF][N] = {};
    const int end = offsets[segment + 1];
    for (int first = offsets[segment]; first < end; first += THREADS) {
        const int found =
            turns * find_regions<THREADS, TILE>(order, cells, first, end, tile.top, tile.left, tile.list, tile.sums);
        for (int start = 0; start < found; start += group) {
            const int here = min(group, found - start);
            for (int i = threadIdx.x; i < here * 2; i += THREADS) tile.rows[i / 2][i % 2] = 0;
            for (int i = threadIdx.x; i < here * TILE; i += THREADS) tile.columns[i / TILE][i % TILE] = 0;
            __syncthreads();
            // One bin of one axis for each thread.
            const int which = threadIdx.x / turn, row = threadIdx.x - which * turn;
            if (which < here) {
                const int number = tile.list[(start + which) / turns], at = (start + which) % turns;
                const int first_y = at / turns_x * 32, first_x = at % turns_x * 32;
                const Box box = box_of(regions + 5 * number);
                const bool in_y = row < turn_y;
                const int bin = in_y ? first_y + row : first_x + row - turn_y, bins_along = in_y ? bins_y : bins_x;
                const Axis axis =
                    make_axis(in_y ? box.y1 : box.x1, in_y ? box.y2 : box.x2, tile.level.scale,
                              in_y ? tile.level.height : tile.level.width, bins_along, sampling_ratio, aligned);
                unsigned reached = 0;
                if (bin < bins_along)
                    reached = tile_weights(axis, bin, in_y ? tile.top : tile.left, tile.weights[threadIdx.x]);
                for (; reached; reached &= reached - 1u) {
                    const int cell = __ffs(reached) - 1;
                    if (in_y) {
                        atomicOr(&tile.rows[which][cell / HALF], 1u << row);
                    } else {
                        atomicOr(&tile.columns[which][cell], 1u << (row - turn_y));
                    }
                }
                if (row == 0) tile.from[which] = number * channels * bins + (first_y * bins_x + first_x) * bin_stride;
            }
            __syncthreads();
            for (int i = 0; i < here && channel < channels; i++) {
                const unsigned lines = tile.rows[i][half];
                if (!lines) continue;
                for (unsigned columns = tile.columns[i][x]; columns; columns &= columns - 1u) {
                    const int bin_x = __ffs(columns) - 1;
                    const float weight_x = tile.weights[i * turn + turn_y + bin_x][x];
                    for (unsigned rest = lines; rest; rest &= rest - 1u) {
                        const int bin_y = __ffs(rest) - 1;
                        const scalar* p = grad + (tile.from[i] + (bin_y * bins_x + bin_x) * bin_stride + own);
                        const float4 line =
                            *reinterpret_cast<const float4*>(&tile.weights[i * turn + bin_y][half * HALF]);
                        const float weight[HALF] = {line.x * weight_x, line.y * weight_x, line.z * weight_x,
                                                    line.w * weight_x};
                        if (vector) {
                            float value[N];
                            load16(p, value);
#pragma unroll
                            for (int k = 0; k < HALF; k++) add_scaled(sum[k], value, weight[k]);
                            continue;
                        }
#pragma unroll
                        for (int n = 0; n < N; n++, p += step) {
                            const float value = channel + n * LANES < channels ? to_float(*p) : 0.0f;
#pragma unroll
                            for (int k = 0; k < HALF; k++) sum[k][n] = fmaf(weight[k], value, sum[k][n]);
                        }
                    }
                }
            }
            __syncthreads();  // before lists and masks are written again
        }
    }
    const Level level = tile.level;
    const int plane = level.height * level.width, row = tile.top + half * HALF, column = tile.left + x;
    if (column >= level.width || channel >= channels) return;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        if (row + k >= level.height) break;
        const int cell = (row + k) * level.width + column;
        if (vector) {
            store16(level.map + (tile.image * plane + cell) * channels + channel, sum[k]);
            continue;
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int c = channel + n * LANES;
            if (c >= channels) break;
            const int at = last ? (tile.image * plane + cell) * channels + c
                                : (tile.image * channels + c) * plane + cell;
            level.map[at] = from_float<scalar>(sum[k][n]);
        }
    }
}
