// How many values have which magnitude, in bins of the upper bits of an f32.
//
// x: values, from first_value on, `part` of them per group. counts: 1024 bins, added to: the bits of a magnitude, shifted by
// `shift`, less `least`, but not below the first bin nor above the last. NaN and infinities are left out. One group per part.
// Twins: magnitude_counts.cu, src/backend/cpu/columns.rs.

struct Parameters {
    count: u32,
    first_value: u32,
    part: u32,
    shift: u32,
    least: u32,
}

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> counts: array<atomic<u32>, 1024>;
@group(0) @binding(2) var<uniform> p: Parameters;

var<workgroup> found: array<atomic<u32>, 1024>;

@compute @workgroup_size(256)
fn magnitude_counts(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var bin = lane; bin < 1024u; bin += 256u) {
        atomicStore(&found[bin], 0u);
    }
    workgroupBarrier();
    let begin = group_index(group, groups) * p.part;
    let end = min(begin + p.part, p.count);
    for (var i = begin + lane; i < end; i += 256u) {
        let bits = x[p.first_value + i] & 0x7fffffffu;
        if bits < NOT_FINITE {
            let bin = bits >> p.shift;
            atomicAdd(&found[select(min(bin - p.least, 1023u), 0u, bin < p.least)], 1u);
        }
    }
    workgroupBarrier();
    for (var bin = lane; bin < 1024u; bin += 256u) {
        let count = atomicLoad(&found[bin]);
        if count > 0u {
            atomicAdd(&counts[bin], count);
        }
    }
}
