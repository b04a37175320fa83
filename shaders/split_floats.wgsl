// Rows of floats in three parts of BF16 each: x = x0 + x1 + x2, every part the nearest BF16 to what is left.
//
// x [rows, inner], with any steps from row to row and from column to column. out: for each row its first parts, its second,
// its third, two in a word, each filled up with zeros to `part_words` words. Nothing is lost of values from 2^-110 on, of
// smaller ones what is below 2^-134; the first part is cut off where rounding makes it infinite. An infinity or a NaN has
// one part. A group splits 32 rows of 64 values. Groups: tiles of columns, then of rows.
// Twins: split_floats.cu, `parts` in tests/cuda_emu/tests/split.rs.

struct Parameters {
    rows: u32,
    inner: u32,
    // First value, and steps to the next row and column.
    first: u32,
    row: u32,
    column: u32,
    part_words: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<uniform> p: Parameters;

const PARTS = 3u;
const ROWS = 32u;
const COLUMNS = 64u;

// The nearest BF16, or the next towards zero.
fn part_of(x: f32) -> u32 {
    let part = bitcast<u32>(round_to_bf16(x));
    if (part & 0x7fffffffu) == NOT_FINITE {
        return bitcast<u32>(x) >> 16u;
    }
    return part >> 16u;
}

fn split(x: f32) -> vec3<u32> {
    let bits = bitcast<u32>(x);
    if (bits & 0x7fffffffu) >= NOT_FINITE {
        // A NaN stays one, whatever bits it had.
        let is_nan = (bits & 0x7fffffffu) > NOT_FINITE;
        return vec3(select(bits >> 16u, bits >> 16u | 0x40u, is_nan), 0u, 0u);
    }
    let first = part_of(x);
    let left = x - bitcast<f32>(first << 16u);
    let second = part_of(left);
    return vec3(first, second, part_of(left - bitcast<f32>(second << 16u)));
}

fn parts_at(i: u32, k: u32) -> vec3<u32> {
    if k >= p.inner {
        return vec3(0u);
    }
    return split(x[p.first + i * p.row + k * p.column]);
}

@compute @workgroup_size(256)
fn split_floats(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let across = (p.part_words * 2u + COLUMNS - 1u) / COLUMNS;
    let first_row = group_index(group, groups) / across * ROWS;
    let first_word = group_index(group, groups) % across * COLUMNS / 2u;
    for (var item = lane; item < ROWS * COLUMNS / 2u; item += 256u) {
        let i = first_row + item / (COLUMNS / 2u);
        let word = first_word + item % (COLUMNS / 2u);
        if i < p.rows && word < p.part_words {
            let parts = parts_at(i, 2u * word) | parts_at(i, 2u * word + 1u) << vec3(16u);
            let at = i * PARTS * p.part_words + word;
            out[at] = parts.x;
            out[at + p.part_words] = parts.y;
            out[at + 2u * p.part_words] = parts.z;
        }
    }
}
