// Groups are spread over two dimensions; kernels count them in one.

fn group_index(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.x + group.y * groups.x;
}
