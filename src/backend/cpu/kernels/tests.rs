use super::super::elementwise;
use super::*;
use half::bf16 as Bf16;

/// A cheap deterministic sequence of bytes.
fn bytes(seed: u32) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    }
}

fn floats(seed: u32, count: usize) -> Vec<f32> {
    let mut next = bytes(seed);
    (0..count)
        .map(|_| (f32::from(next()) - 128.0) / 64.0)
        .collect()
}

fn split<T: Copy>(words: &[[[T; LANES]; 2]]) -> [Vec<[T; LANES]>; 2] {
    [0, 1].map(|half| words.iter().map(|word| word[half]).collect())
}

#[test]
fn every_twin_sums_floats() {
    for isa in Isa::all() {
        for tokens in [1, 2, 4, 8] {
            let words = 37;
            let weights: Vec<[[f32; LANES]; 2]> =
                bytemuck::cast_slice(&floats(1, words * FLOAT_ROWS)).to_vec();
            let [low, high] = split(&weights);
            let input = floats(2, words * tokens);
            let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
            float(isa, tokens, [&low, &high], &input, &mut sums);
            for token in 0..tokens {
                for row in 0..FLOAT_ROWS {
                    let exact: f64 = (0..words)
                        .map(|k| {
                            f64::from(weights[k][row / LANES][row % LANES])
                                * f64::from(input[k * tokens + token])
                        })
                        .sum();
                    assert!(
                        (f64::from(sums[token][row]) - exact).abs() < 1e-4,
                        "{isa:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_twin_sums_bf16() {
    let word = |low: f32, high: f32| {
        u32::from(Bf16::from_f32(low).to_bits()) | u32::from(Bf16::from_f32(high).to_bits()) << 16
    };
    for isa in Isa::all() {
        for tokens in [1, 2, 4, 8] {
            let words = 19;
            let w = floats(3, 2 * words * FLOAT_ROWS);
            let x = floats(4, 2 * words * tokens);
            let pack = |values: &[f32]| -> Vec<u32> {
                values
                    .chunks(2)
                    .map(|pair| word(pair[0], pair[1]))
                    .collect()
            };
            let weights: Vec<[[u32; LANES]; 2]> = bytemuck::cast_slice(&pack(&w)).to_vec();
            let [low, high] = split(&weights);
            let input = pack(&x);
            let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
            bf16(isa, tokens, [&low, &high], &input, &mut sums);
            for token in 0..tokens {
                for row in 0..FLOAT_ROWS {
                    let exact: f32 = (0..2 * words)
                        .map(|i| {
                            let (k, half) = (i / 2, i % 2);
                            w[2 * (k * FLOAT_ROWS + row) + half]
                                * x[2 * (k * tokens + token) + half]
                        })
                        .sum();
                    assert!((sums[token][row] - exact).abs() < 1e-4, "{isa:?}");
                }
            }
        }
    }
}

fn words(seed: u32, count: usize) -> Vec<u32> {
    let mut next = bytes(seed);
    (0..count)
        .map(|_| u32::from_le_bytes([next(), next(), next(), next()]))
        .collect()
}

/// The product of one unsigned and one signed word.
fn dot(w: u32, x: u32) -> i32 {
    let (w, x) = (w.to_le_bytes(), x.to_le_bytes());
    w.iter()
        .zip(x)
        .map(|(w, x)| i32::from(*w) * i32::from(x as i8))
        .sum()
}

#[test]
fn every_twin_sums_blocks() {
    for isa in Isa::all() {
        for (tokens, affine) in [(1, false), (2, true), (4, false), (8, true), (8, false)] {
            let count = 5;
            let codes: Vec<[u32; LANES]> = words(5, count * 8 * LANES).as_chunks().0.to_vec();
            let d: Vec<[f32; LANES]> = floats(6, count * LANES).as_chunks().0.to_vec();
            let m = if affine { d.clone() } else { Vec::new() };
            let x = words(7, count * 8 * tokens);
            let xd = floats(8, count * tokens);
            let start: Vec<i32> = (0..count * tokens).map(|i| i as i32 * 100 - 300).collect();
            let weights = Blocks {
                codes: &codes,
                d: &d,
                m: &m,
            };
            let input = BlockInput {
                codes: &x,
                d: &xd,
                start: &start,
                s: &xd,
            };
            let mut sums = [[f32::NAN; LANES]; MAX_TOKENS];
            blocks(isa, tokens, weights, input, &mut sums);
            for token in 0..tokens {
                for lane in 0..LANES {
                    let mut exact = 0.0;
                    for b in 0..count {
                        let mut sum = start[b * tokens + token];
                        for j in 0..8 {
                            let word = b * 8 + j;
                            sum += dot(codes[word][lane], x[word * tokens + token]);
                        }
                        exact += f64::from(sum)
                            * f64::from(d[b][lane])
                            * f64::from(xd[b * tokens + token]);
                        if affine {
                            exact += f64::from(m[b][lane]) * f64::from(xd[b * tokens + token]);
                        }
                    }
                    let error = (f64::from(sums[token][lane]) - exact).abs();
                    assert!(error < 1.0, "{isa:?} {} {exact}", sums[token][lane]);
                }
            }
        }
    }
}

fn super_lanes(seed: u32, affine: bool) -> SuperLanes {
    let scale = |word: u32| (word & 127) as i32 - 64;
    let rows = |words: Vec<u32>| -> Vec<[u32; LANES]> { words.as_chunks().0.to_vec() };
    let (scales, mins) = (rows(words(seed, 256)), rows(words(seed + 50, 128)));
    let d = floats(seed, LANES).as_chunks().0[0];
    SuperLanes {
        d,
        dmin: if affine { d } else { [0.0; LANES] },
        scales: std::array::from_fn(|sub| scales[sub].map(scale)),
        mins: std::array::from_fn(|pair| mins[pair].map(|w| w & 0x03ff_03ff)),
    }
}

/// Sixteen rows as slices.
fn rows_of(all: &[u32]) -> [&[u32]; LANES] {
    let len = all.len() / LANES;
    std::array::from_fn(|row| &all[row * len..][..len])
}

fn interleaved(isa: Isa, rows: [&[u32]; LANES]) -> Vec<[u32; LANES]> {
    let mut panel = vec![[0; LANES]; rows[0].len()];
    interleave(isa, rows, &mut panel);
    panel
}

#[test]
fn rows_of_words_sum_as_panels_do() {
    for (isa, words) in Isa::all()
        .into_iter()
        .flat_map(|isa| [16, 39].map(|words| (isa, words)))
    {
        let values = floats(21, FLOAT_ROWS * words);
        let stored: &[u32] = bytemuck::cast_slice(&values);
        let halves = [&stored[..LANES * words], &stored[LANES * words..]].map(rows_of);
        let panels = halves.map(|rows| interleaved(isa, rows));
        let rows = std::array::from_fn(|row| halves[row / LANES][row % LANES]);
        let input = floats(22, words);
        let x: &[u32] = bytemuck::cast_slice(&input);
        let ahead = Ahead::from(&[], 0);
        let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
        let panels: Halves<u32> = [&panels[0], &panels[1]];
        bf16(isa, 1, panels, x, &mut sums);
        assert_eq!(bf16_rows(isa, rows, x, ahead), sums[0], "{isa:?} {words}");
        float(isa, 1, panels.map(bytemuck::cast_slice), &input, &mut sums);
        assert_eq!(float_rows(isa, rows, x, ahead), sums[0], "{isa:?} {words}");
    }
}

#[test]
fn rows_of_blocks_sum_as_panels_do() {
    for (isa, count) in Isa::all()
        .into_iter()
        .flat_map(|isa| [1, 5, 16].map(|n| (isa, n)))
    {
        for affine in [false, true] {
            let stored = words(23, LANES * count * 8);
            let mut scales = [BlockScales::default(); LANES];
            for (row, scales) in scales.iter_mut().enumerate() {
                scales.d.copy_from_slice(&floats(24 + row as u32, LANES));
                scales.m.copy_from_slice(&floats(54 + row as u32, LANES));
            }
            let rows = BlockRows {
                codes: rows_of(&stored),
                scales: &scales,
                affine,
            };
            let (codes, x) = (interleaved(isa, rows.codes), words(25, count * 8));
            let column = |of: fn(&BlockScales) -> &[f32; LANES]| -> Vec<[f32; LANES]> {
                let lanes = |block: usize| scales.each_ref().map(|scales| of(scales)[block]);
                (0..count).map(lanes).collect()
            };
            let (d, m) = (column(|scales| &scales.d), column(|scales| &scales.m));
            let xd = floats(26, count);
            let start: Vec<i32> = (0..count as i32).map(|i| 70 - 31 * i).collect();
            let input = BlockInput {
                codes: &x,
                d: &xd,
                start: &start,
                s: &xd,
            };
            let panel = Blocks {
                codes: &codes,
                d: &d,
                m: if affine { &m } else { &[] },
            };
            let mut sums = [[0.0; LANES]; MAX_TOKENS];
            blocks(isa, 1, panel, input, &mut sums);
            assert_eq!(block_rows(isa, rows, input), sums[0], "{isa:?} {count}");
        }
    }
}

#[test]
fn rows_of_super_blocks_sum_as_panels_do() {
    for isa in Isa::all() {
        for (count, has_dmin, sub_words) in
            [(2, true, 8), (1, false, 4), (2, false, 8), (2, true, 4)]
        {
            let stored = words(27, LANES * count * 64);
            let lanes: Vec<SuperLanes> = (0..count as u32)
                .map(|seed| super_lanes(seed, has_dmin))
                .collect();
            let mut scales = [[SuperScales::default(); MAX_SUPER_BLOCKS]; LANES];
            for (row, scales) in scales.iter_mut().enumerate() {
                for (scales, lanes) in scales.iter_mut().zip(&lanes) {
                    let words: &[[u32; LANES]] = bytemuck::cast_slice(std::slice::from_ref(lanes));
                    let words: Vec<u32> = words.iter().map(|lanes| lanes[row]).collect();
                    *scales = bytemuck::cast_slice(&words)[0];
                }
            }
            let rows = SuperRows {
                codes: rows_of(&stored),
                scales: &scales,
                has_dmin,
                sub_words,
            };
            let (codes, x) = (interleaved(isa, rows.codes), words(28, count * 64));
            let xd = floats(29, count);
            let sums_of: Vec<u32> = words(30, count * 32 / sub_words)
                .iter()
                .map(|w| w & 0x0fff_0fff)
                .collect();
            let input = SuperInput {
                codes: &x,
                d: &xd,
                sums: &sums_of,
            };
            let panel = SuperBlocks {
                codes: &codes,
                scales: &lanes,
                has_dmin,
                sub_words,
            };
            let mut sums = [[0.0; LANES]; MAX_TOKENS];
            super_blocks(isa, 1, panel, input, &mut sums);
            assert_eq!(super_rows(isa, rows, input), sums[0], "{isa:?} {count}");
        }
    }
}

#[test]
fn every_twin_sums_super_blocks() {
    for isa in Isa::all() {
        for (tokens, affine, sub_words) in
            [(1, true, 8), (2, false, 4), (4, false, 8), (8, true, 4)]
        {
            let (count, subs) = (3, 64 / sub_words);
            let codes: Vec<[u32; LANES]> = words(9, count * 64 * LANES)
                .iter()
                .map(|w| w & 0x3f3f_3f3f)
                .collect::<Vec<_>>()
                .as_chunks()
                .0
                .to_vec();
            let mut scales = vec![SuperLanes::default(); count];
            for (block, lanes) in scales.iter_mut().enumerate() {
                *lanes = super_lanes(10 + block as u32, affine);
            }
            let x = words(13, count * 64 * tokens);
            let xd = floats(14, count * tokens);
            let xs: Vec<u32> = words(15, count * subs / 2 * tokens)
                .iter()
                .map(|w| w & 0x0fff_0fff)
                .collect();
            let weights = SuperBlocks {
                codes: &codes,
                scales: &scales,
                has_dmin: affine,
                sub_words,
            };
            let input = SuperInput {
                codes: &x,
                d: &xd,
                sums: &xs,
            };
            let mut sums = [[f32::NAN; LANES]; MAX_TOKENS];
            super_blocks(isa, tokens, weights, input, &mut sums);
            for token in 0..tokens {
                for lane in 0..LANES {
                    let mut exact = 0.0;
                    for b in 0..count {
                        let (mut sum, mut min) = (0_i64, 0_i64);
                        for word in 0..64 {
                            let at = b * 64 + word;
                            let scale = i64::from(scales[b].scales[word / sub_words][lane]);
                            sum += scale * i64::from(dot(codes[at][lane], x[at * tokens + token]));
                        }
                        for pair in 0..subs / 2 {
                            let at = b * subs / 2 + pair;
                            let (w, s) = (scales[b].mins[pair][lane], xs[at * tokens + token]);
                            min += i64::from(w & 0xffff) * i64::from(s & 0xffff)
                                + i64::from(w >> 16) * i64::from(s >> 16);
                        }
                        exact += (sum - min) as f64
                            * f64::from(scales[b].d[lane])
                            * f64::from(xd[b * tokens + token]);
                    }
                    let error = (f64::from(sums[token][lane]) - exact).abs();
                    assert!(
                        error <= 1e-5 * exact.abs() + 30.0,
                        "{isa:?} {} {exact}",
                        sums[token][lane]
                    );
                }
            }
        }
    }
}

#[test]
fn interleaving_turns_rows_into_columns() {
    for isa in Isa::all() {
        for count in [1, 16, 37, 64] {
            let rows: Vec<Vec<u32>> = (0..LANES as u32)
                .map(|lane| (0..count).map(|word| lane * 1000 + word).collect())
                .collect();
            let views: [&[u32]; LANES] = std::array::from_fn(|lane| rows[lane].as_slice());
            let mut panel = vec![[0; LANES]; count as usize];
            interleave(isa, views, &mut panel);
            for (word, lanes) in panel.iter().enumerate() {
                for (lane, value) in lanes.iter().enumerate() {
                    assert_eq!(*value, lane as u32 * 1000 + word as u32);
                }
            }
        }
    }
}

#[test]
fn widening_gives_both_values_of_a_pair() {
    let values = floats(31, 4 * LANES).into_iter().map(Bf16::from_f32);
    let values: Vec<[Bf16; 2]> = bytemuck::cast_slice(&values.collect::<Vec<_>>()).to_vec();
    let pairs: Vec<[u32; LANES]> = bytemuck::cast_slice(&values).to_vec();
    for isa in Isa::all() {
        let mut words = [[0; LANES]; 4];
        widen(isa, &pairs, &mut words);
        for (word, lanes) in words.iter().enumerate() {
            for (lane, bits) in lanes.iter().enumerate() {
                let expected = values[word / 2 * LANES + lane][word % 2];
                assert_eq!(f32::from_bits(*bits), expected.to_f32());
            }
        }
    }
}

#[test]
fn dots_are_those_of_rows_one_by_one() {
    let values = |len: usize, seed: usize| -> Vec<f32> {
        let value = |i| ((i * 37 + seed) % 101) as f32 / 7.0 - 6.9;
        (0..len).map(value).collect()
    };
    for (len, stride) in [(16, 16), (64, 70), (128, 300)] {
        let (vector, rows) = (values(len, 5), values(16 * stride, 11));
        for isa in Isa::all() {
            let Some(dots) = super::dots(isa, &vector, &rows, stride) else {
                continue;
            };
            for (row, found) in dots.into_iter().enumerate() {
                assert_eq!(
                    found,
                    elementwise::dot(&vector, &rows[row * stride..][..len])
                );
            }
        }
    }
    assert!(super::dots(Isa::detect(), &values(17, 0), &values(800, 0), 40).is_none());
}
