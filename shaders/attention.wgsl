// Causal grouped-query attention of one sequence: softmax(q k^T / sqrt(head_dim)) v, in one pass over the positions.
//
// query: [all rows, heads head_dim], the sequence from first_row on; its row r sees position + r + 1 rows of keys and
// values, [positions, key_value_heads head_dim]; out as query. With is_f16, queries and sums of values are rounded to F16 as
// llama.cpp's flash attention on CPU does; keys and values were when they were stored. One group per row and head, whose
// threads compute the scores of 64 positions, then each some channels. head_dim is at most 256.
// Twins: attention.cu, src/backend/cpu/attention.rs.

struct Parameters {
    rows: u32,
    first_row: u32,
    position: u32,
    heads: u32,
    key_value_heads: u32,
    head_dim: u32,
    is_f16: u32,
}

@group(0) @binding(0) var<storage, read> query: array<f32>;
@group(0) @binding(1) var<storage, read> keys: array<f32>;
@group(0) @binding(2) var<storage, read> values: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
@group(0) @binding(4) var<uniform> p: Parameters;

var<workgroup> scores: array<f32, 64>;

fn rounded(x: f32) -> f32 {
    if p.is_f16 != 0u {
        return round_to_f16(x);
    }
    return x;
}

@compute @workgroup_size(64)
fn attention(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = group_index(group, groups);
    let row = item / p.heads;
    let head = item % p.heads;
    if row >= p.rows {
        return;
    }
    let seen = p.position + row + 1u;
    let q = ((p.first_row + row) * p.heads + head) * p.head_dim;
    let width = p.key_value_heads * p.head_dim;
    let cache = head / (p.heads / p.key_value_heads) * p.head_dim;
    let scale = 1.0 / sqrt(f32(p.head_dim));
    var sums = vec4(0.0);
    var total = 0.0;
    var largest = -3.4e38;
    for (var first = 0u; first < seen; first += 64u) {
        if first + lane < seen {
            var score = 0.0;
            for (var c = 0u; c < p.head_dim; c++) {
                score += rounded(query[q + c]) * keys[(first + lane) * width + cache + c];
            }
            scores[lane] = score * scale;
        }
        workgroupBarrier();
        for (var other = 0u; other < min(64u, seen - first); other++) {
            let score = scores[other];
            var weight = 1.0;
            if score > largest {
                // An infinite score has no share; in F16, as runtimes have it, the first one has all.
                if p.is_f16 == 0u && bitcast<u32>(score) == NOT_FINITE {
                    weight = bitcast<f32>(bitcast<u32>(score) | 0x400000u);
                }
                let shrink = exp_of(largest - score);
                largest = score;
                total *= shrink;
                for (var part = 0u; part < 4u; part++) {
                    sums[part] = rounded(sums[part] * shrink);
                }
            } else {
                weight = exp_of(score - largest);
            }
            total += weight;
            for (var part = 0u; part < 4u; part++) {
                let c = part * 64u + lane;
                if c < p.head_dim {
                    let v = values[(first + other) * width + cache + c];
                    sums[part] = rounded(sums[part] + weight * v);
                }
            }
        }
        workgroupBarrier();
    }
    for (var part = 0u; part < 4u; part++) {
        let c = part * 64u + lane;
        if c < p.head_dim {
            out[q + c] = sums[part] / total;
        }
    }
}
