// RoI pooling on the device: the largest value of each bin, and a backward that gives the same bits in every run.
//
// roi_pool_turn      grid (tiles of all planes), block THREADS: from (n, rows, columns) to (n, columns, rows), by which
//                    contiguous maps and gradients become channels-last. So the others read channels-last alone.
// roi_pool_forward   grid (R, parts), block THREADS: a block pools `each` channels of one region; a thread visits the
//                    cells of a bin in row-major order, with 16 bytes of channels or with one. For a contiguous output
//                    the block collects its values, which lie together there, in shared memory, where there is room.
// roi_pool_sort      grid B, block SORT: the regions of each image, see regions.cuh.
// roi_pool_backward  grid (tiles of all images, slices of channels), block GROUPS x LANES: a block owns TILE x TILE
//                    cells of LANES channels. The bins that overlap the tile are listed, and dealt to groups of LANES
//                    threads, UNROLL at a time; a group adds to cells of its own, a thread to one channel, and at the
//                    end the groups' cells are added in their order. Of a region the bins are some rows and columns, so
//                    that a sum over the regions tells which bin comes at which place.
//
// Layouts: maps (B, C, H, W) and outputs (R, C, oh, ow), read channels-last, written so (last = 1) or contiguous.
// regions (R, 5) float32: image, x1, y1, x2, y2. A region that names no image or is not finite gives zeros and
// sends nothing. argmax (R, C, oh, ow) int32, channels-last: y * W + x of the cell, -1 for none.
// With `vector`, C is a multiple of a pack and all pointers lie on 16-byte boundaries.
// Source: Girshick, Fast R-CNN (2015), section 2.1; the cells of a bin are those of torchvision.ops.roi_pool.

#include "box.cuh"
#include "regions.cuh"
#include "scalar.cuh"

// The lowest finite number of a storage type.
__device__ __forceinline__ float lowest(float) {
    return -3.40282346638528859812e38f;
}

__device__ __forceinline__ float lowest(bfloat16) {
    return to_float(bfloat16{0xff7f});
}

__device__ __forceinline__ float lowest(float16) {
    return -65504.0f;
}

// First cell of a region on an axis of a map and the extent of a bin, both in cells.
struct Axis {
    float first, step;
    int size;
};

// Nearest whole number, halves away from zero.
__device__ __forceinline__ float round_away(float x) {
    const float whole = truncf(x);
    return fabsf(x - whole) >= 0.5f ? whole + (x < 0.0f ? -1.0f : 1.0f) : whole;
}

__device__ __forceinline__ Axis make_axis(float low, float high, float scale, int size, int bins) {
    const float first = round_away(low * scale), last = round_away(high * scale);
    const float step = fmaxf((last - first) + 1.0f, 1.0f) / static_cast<float>(bins);
    // Scaling may make infinity of large coordinates: a map of no cells then.
    return {first, step, is_finite(first) && is_finite(step) ? size : 0};
}

// Cells of a bin on the map, from x up to y, which does not belong to them.
__device__ __forceinline__ int2 cells_of(const Axis& axis, int bin) {
    const float size = static_cast<float>(axis.size), number = static_cast<float>(bin);
    const float start = floorf(number * axis.step) + axis.first, end = ceilf((number + 1.0f) * axis.step) + axis.first;
    return make_int2(static_cast<int>(fminf(fmaxf(start, 0.0f), size)),
                     static_cast<int>(fminf(fmaxf(end, 0.0f), size)));
}

struct Region {
    int image;  // -1: none
    Axis y, x;
};

__device__ __forceinline__ Region region_of(const float* region, float scale, int batch, int height, int width,
                                            int bins_y, int bins_x) {
    const Box box = {region[1], region[2], region[3], region[4]};
    return {box_finite(box) ? region_image(region, batch) : -1, make_axis(box.y1, box.y2, scale, height, bins_y),
            make_axis(box.x1, box.x2, scale, width, bins_x)};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    roi_pool_turn(const scalar* __restrict__ from, scalar* __restrict__ to, int rows, int columns) {
    __shared__ scalar square[32][33];
    const int across = (columns + 31) / 32, down = (rows + 31) / 32;
    const int plane = blockIdx.x / (down * across);
    const int top = static_cast<int>(blockIdx.x) / across % down * 32, left = blockIdx.x % across * 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    from += plane * rows * columns, to += plane * rows * columns;
    for (int i = warp; i < min(32, rows - top); i += THREADS / 32) {
        if (left + lane < columns) square[i][lane] = from[(top + i) * columns + left + lane];
    }
    __syncthreads();
    for (int i = warp; i < min(32, columns - left); i += THREADS / 32) {
        if (top + lane < rows) to[(left + i) * rows + top + lane] = square[lane][i];
    }
}

// A block's channels of a region's output, in packs of N. `stage` has room for them, or is null.
template <int N>
__device__ __forceinline__ void pool(const scalar* map, const Region& region, scalar* output, int* argmax,
                                     scalar* stage, int channels, int width, int bins_y, int bins_x, int each,
                                     int last) {
    const int bins = bins_y * bins_x, first = blockIdx.y * each, here = min(each, channels - first), packs = here / N;
    for (int item = threadIdx.x; item < packs * bins; item += THREADS) {
        const int bin = item / packs, channel = first + (item - bin * packs) * N, bin_y = bin / bins_x;
        const int2 rows = cells_of(region.y, bin_y), columns = cells_of(region.x, bin - bin_y * bins_x);
        const scalar* p = map + channel;
        const bool empty = region.image < 0 || rows.x >= rows.y || columns.x >= columns.y;
        float best[N];
        int at[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            best[i] = empty ? 0.0f : lowest(scalar{});
            at[i] = -1;
        }
        for (int y = rows.x; y < rows.y && !empty; y++) {
#pragma unroll 2
            for (int x = columns.x; x < columns.y; x++) {
                const int cell = y * width + x;
                float value[N];
                if constexpr (N == 1) {
                    value[0] = to_float(p[cell * channels]);
                } else {
                    load16(p + cell * channels, value);
                }
#pragma unroll
                for (int i = 0; i < N; i++) {
                    if (value[i] > best[i]) best[i] = value[i], at[i] = cell;  // NaN is above nothing
                }
            }
        }
        const int out = bin * channels + channel;
        if (!last) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                const scalar value = from_float<scalar>(best[i]);
                if (stage) {
                    stage[(channel - first + i) * bins + bin] = value;
                } else {
                    output[(channel + i) * bins + bin] = value;
                }
            }
        } else if constexpr (N == 1) {
            output[out] = from_float<scalar>(best[0]);
        } else {
            store16(output + out, best);
        }
        if (!argmax) continue;
        if constexpr (N == 1) {
            argmax[out] = at[0];
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                *reinterpret_cast<int4*>(argmax + out + i) = make_int4(at[i], at[i + 1], at[i + 2], at[i + 3]);
            }
        }
    }
    if (!stage) return;
    __syncthreads();
    for (int i = threadIdx.x; i < here * bins; i += THREADS) output[first * bins + i] = stage[i];
}

// Without `argmax` no gradient will be asked for. With `staged`, the channels of a block fit the stage.
extern "C" __global__ void __launch_bounds__(THREADS)
    roi_pool_forward(const scalar* __restrict__ map, const float* __restrict__ regions, scalar* __restrict__ output,
                     int* __restrict__ argmax, float scale, int batch, int channels, int height, int width, int bins_y,
                     int bins_x, int each, int last, int staged, int vector) {
    __shared__ Region region;  // to spare registers
    __shared__ scalar values[STAGE];
    if (threadIdx.x == 0)
        region = region_of(regions + 5 * blockIdx.x, scale, batch, height, width, bins_y, bins_x);
    __syncthreads();
    const scalar* plane = map + max(region.image, 0) * channels * height * width;
    const int out = blockIdx.x * (channels * bins_y * bins_x);
    int* at = argmax ? argmax + out : nullptr;
    scalar* stage = staged ? values : nullptr;
    if (vector) {
        pool<Pack<scalar>::size>(plane, region, output + out, at, stage, channels, width, bins_y, bins_x, each, last);
    } else {
        pool<1>(plane, region, output + out, at, stage, channels, width, bins_y, bins_x, each, last);
    }
}

extern "C" __global__ void __launch_bounds__(SORT, 1)
    roi_pool_sort(const float* __restrict__ regions, int count, int* __restrict__ order, int4* __restrict__ cells,
                  int* __restrict__ offsets, float scale, int batch, int height, int width, int bins_y, int bins_x) {
    __shared__ int sums[SORT / 32], before;
    sort_regions<SORT>(count, order, cells, offsets, before, sums, [&](int i) -> Touched {
        const Region region = region_of(regions + 5 * i, scale, batch, height, width, bins_y, bins_x);
        return {region.image, cells_of(region.y, 0).x, cells_of(region.x, 0).x, cells_of(region.y, bins_y - 1).y - 1,
                cells_of(region.x, bins_x - 1).y - 1};
    });
}

// Bins of an axis that overlap the TILE cells from `edge` on, the end excluded: both borders of bins rise.
__device__ __forceinline__ int2 bins_over(const Axis& axis, int bins, int edge) {
    int first = 0;
    while (first < bins && cells_of(axis, first).y <= edge) first++;
    int end = first;
    while (end < bins && cells_of(axis, end).x < edge + TILE) end++;
    return make_int2(first, end);
}

// Sum of the values of the threads with a lower index, and of all threads of the block. To be called by all.
__device__ __forceinline__ int sum_before(int value, int (&sums)[GROUPS * LANES / 32], int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int upto = value;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    total = 0;
    for (int i = 0; i < GROUPS * LANES / 32; i++) {
        if (i < warp) upto += sums[i];
        total += sums[i];
    }
    return upto - value;
}

extern "C" __global__ void __launch_bounds__(GROUPS* LANES)
    roi_pool_backward(scalar* __restrict__ map, const float* __restrict__ regions, const scalar* __restrict__ grad,
                      const int* __restrict__ argmax, const int* __restrict__ order, const int4* __restrict__ cells,
                      const int* __restrict__ offsets, float scale, int batch, int channels, int height, int width,
                      int bins_y, int bins_x, int last) {
    constexpr int N = GROUPS * LANES;
    constexpr int STRIDE = LANES + 1;  // so that a row of cells of one channel lies in different banks
    __shared__ float sums[GROUPS][TILE * TILE * STRIDE];
    __shared__ int list[N], bins_here[BINS], warps[N / 32];
    // Of each region in the list: the place of its first bin that overlaps the tile, that bin, and how many of a row do.
    __shared__ int places[N], corners[N], widths[N];
    const int across = (width + TILE - 1) / TILE, down = (height + TILE - 1) / TILE;
    const int image = blockIdx.x / (down * across);
    const int top = static_cast<int>(blockIdx.x) / across % down * TILE, left = blockIdx.x % across * TILE;
    const int bins = bins_y * bins_x, thread = threadIdx.x, lane = thread % LANES, group = thread / LANES;
    const int first_channel = blockIdx.y * LANES, own = first_channel + lane;
    const unsigned reciprocal = 0xffffffffu / static_cast<unsigned>(width);
    for (int i = 0; i < TILE * TILE; i++) sums[group][i * STRIDE + lane] = 0.0f;
    const int end = offsets[image + 1];
    for (int first = offsets[image]; first < end; first += N) {
        const int found = find_regions<N, TILE>(order, cells, first, end, top, left, list, warps);
        int overlapping = 0, total;
        if (thread < found) {
            const Region region = region_of(regions + 5 * list[thread], scale, batch, height, width, bins_y, bins_x);
            const int2 rows = bins_over(region.y, bins_y, top), columns = bins_over(region.x, bins_x, left);
            overlapping = (rows.y - rows.x) * (columns.y - columns.x);
            corners[thread] = rows.x * bins_x + columns.x;
            widths[thread] = columns.y - columns.x;
        }
        places[thread] = sum_before(overlapping, warps, total);
        __syncthreads();
        for (int start = 0; start < total; start += BINS) {
            const int count = min(BINS, total - start);
            for (int i = thread; i < count; i += N) {
                // The last region that begins here or before: those without a bin begin where the next one does.
                int low = 0, high = found;
                while (high - low > 1) {
                    const int middle = (low + high) / 2;
                    if (places[middle] <= start + i) {
                        low = middle;
                    } else {
                        high = middle;
                    }
                }
                const int place = start + i - places[low], row = place / widths[low];
                const int bin = corners[low] + row * bins_x + place - row * widths[low];
                bins_here[i] = (list[low] * bins + bin) * channels;
            }
            __syncthreads();
            for (int k = group * UNROLL; k < count && own < channels; k += GROUPS * UNROLL) {
                // The loads of several bins are under way at once.
                int at[UNROLL];
                float value[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    const int from = bins_here[min(k + u, count - 1)] + own;
                    at[u] = argmax[from];
                    value[u] = to_float(grad[from]);
                }
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    if (at[u] < 0 || k + u >= count) continue;
                    // Row and column: the product with the reciprocal is the quotient or one less.
                    int y = static_cast<int>(__umulhi(static_cast<unsigned>(at[u]), reciprocal)), x = at[u] - y * width;
                    if (x >= width) y++, x -= width;
                    y -= top, x -= left;
                    if (y >= 0 && y < TILE && x >= 0 && x < TILE) {
                        sums[group][(y * TILE + x) * STRIDE + lane] += value[u];
                    }
                }
            }
            __syncthreads();  // before the list is written again
        }
    }
    __syncthreads();
    const int tall = min(TILE, height - top), wide = min(TILE, width - left);
    const int channels_here = min(LANES, channels - first_channel), plane = height * width;
    for (int i = thread; i < TILE * TILE * LANES; i += N) {
        // Neighbouring threads: channels, or columns of the map.
        const int c = last ? i % LANES : i / (TILE * TILE), cell = last ? i / LANES : i % (TILE * TILE);
        const int y = cell / TILE, x = cell % TILE;
        if (y >= tall || x >= wide || c >= channels_here) continue;
        const int at = (top + y) * width + left + x, channel = first_channel + c;
        float sum = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) sum += sums[g][cell * STRIDE + c];
        map[last ? (image * plane + at) * channels + channel : (image * channels + channel) * plane + at] =
            from_float<scalar>(sum);
    }
}
