//! The emulated grid itself: a kernel that is right runs, and a planted bug of each kind is caught and named.

use hone::cuda::Backend;
use hone::cuda::backend::Extents;
use hone::cuda::emulator::Emulator;

const N: usize = 64;

/// Launches `body` as a kernel over two blocks of 64 threads, with `x` (64 floats, written) and `y` (64 floats, not), and
/// returns `y`, or the error.
fn launch(body: &str) -> Result<Vec<f32>, String> {
    let source = format!(
        "#include \"mma.cuh\"\nstruct Params {{ In<float> x; Out<float> y; int n, unused; }};\nKERNEL(kernel, Params, 64) {{\n{body}\n}}\n"
    );
    let emulator = Emulator::new().unwrap();
    let x = emulator.allocate(N * 4).unwrap().unwrap();
    let y = emulator.allocate(N * 4).unwrap().unwrap();
    let values: Vec<u8> = (0..N).flat_map(|i| (i as f32).to_le_bytes()).collect();
    emulator.upload(x, &values).unwrap();
    let params: Vec<u8> =
        [x.to_le_bytes().to_vec(), y.to_le_bytes().to_vec(), vec![N as u8, 0, 0, 0, 0, 0, 0, 0]].concat();
    let extents = Extents { grid: [1, 1, 1], threads: N as u32, shared: 4096 };
    emulator.launch_source(&source, "kernel", extents, &params).map_err(|e| e.to_string())?;
    let mut bytes = vec![0u8; N * 4];
    emulator.download(y, &mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// The message contains `expected`.
fn caught(expected: &str, body: &str) {
    let message = launch(body).expect_err(expected);
    assert!(message.contains(expected), "{message}");
}

/// A reversal through shared memory, right: every bug below is a small change to something like it.
#[test]
fn barriers_shared_memory_and_shuffles_work() {
    let y = launch(
        "SHARED(float, tile, 64);
         tile[threadIdx.x] = p.x[threadIdx.x];
         __syncthreads();
         const float reversed = tile[63 - threadIdx.x];
         const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x & 1);
         p.y[threadIdx.x] = warp_sum(reversed) + (odd == 0xaaaaaaaau ? reversed : -1.0f);",
    )
    .unwrap();
    let half = |i: usize| if i < 32 { (32..64).sum::<usize>() } else { (0..32).sum() };
    let want: Vec<f32> = (0..N).map(|i| (half(i) + 63 - i) as f32).collect();
    assert_eq!(y, want);
}

#[test]
fn asynchronous_copies_arrive_at_their_wait() {
    let y = launch(
        "DYNAMIC_SHARED(float, tile);
         const bool copies = threadIdx.x < 16;
         if (copies) cp_async_16(tile + threadIdx.x * 4, p.x + threadIdx.x * 4, threadIdx.x != 3);
         cp_async_commit();
         cp_async_wait<0>();
         __syncthreads();
         p.y[threadIdx.x] = tile[threadIdx.x];",
    )
    .unwrap();
    let want: Vec<f32> = (0..N).map(|i| if i / 4 == 3 { 0.0 } else { i as f32 }).collect();
    assert_eq!(y, want);
}

/// Fragments of an 16 x 16 by 16 x 8 product, loaded by ldmatrix, against sums written out.
#[test]
fn matrix_fragments_multiply() {
    let y = launch(
        "DYNAMIC_SHARED(bf16, tile);
         const int lane = threadIdx.x % 32;
         if (threadIdx.x < 32) {
             for (int i = lane; i < 16 * 16; i += 32) tile[i] = from_float<bf16>(i % 7);
             for (int i = lane; i < 16 * 16; i += 32) tile[256 + i] = from_float<bf16>(i % 5);
         }
         __syncthreads();
         u32 a[4], b[4];
         ldmatrix(a, tile + (lane % 16 * 16 + lane / 16 * 8));
         ldmatrix_transposed(b, tile + (256 + lane % 16 * 16 + lane / 16 * 8));
         float c[4] = {};
         mma(bf16(), c, a, b);
         if (threadIdx.x >= 32) { p.y[threadIdx.x] = 0.0f; return; }
         float want = 0.0f;
         for (int k = 0; k < 16; k++) want += (lane / 4 * 16 + k) % 7 * ((k * 16 + lane % 4 * 2) % 5);
         p.y[threadIdx.x] = c[0] - want;",
    )
    .unwrap();
    assert_eq!(y, vec![0.0; N]);
}

#[test]
fn an_access_outside_its_buffer() {
    caught("read of 4 bytes at 256 of a buffer of 256 bytes", "p.y[threadIdx.x] = p.x[threadIdx.x + 1];");
    caught("write of 4 bytes at -4 of a buffer", "p.y[static_cast<int>(threadIdx.x) - 1] = 0.0f;");
    caught("of shared memory", "SHARED(float, tile, 64); tile[threadIdx.x + 2000] = 0.0f;");
    caught("pointer to no buffer", "In<float> nothing{}; p.y[threadIdx.x] = nothing[0];");
}

#[test]
fn memory_read_before_it_is_written() {
    caught("before anything was written there", "SHARED(float, tile, 64); p.y[threadIdx.x] = tile[threadIdx.x];");
    caught("before anything was written there", "p.y[threadIdx.x] = p.y[threadIdx.x] + 1.0f;");
    caught("which nothing was written to", "if (threadIdx.x > 0) p.y[threadIdx.x] = 0.0f;");
}

#[test]
fn a_barrier_that_not_all_reach() {
    caught("not reached by all threads", "if (threadIdx.x < 40) __syncthreads();\np.y[threadIdx.x] = 0.0f;");
    caught("wait at barriers in lines", "if (threadIdx.x < 40) {\n__syncthreads();\n} else {\n__syncthreads();\n}");
    caught("warp operation at line", "if (threadIdx.x < 40) p.y[threadIdx.x] = warp_sum(1.0f);");
}

#[test]
fn a_misaligned_vector() {
    caught("misaligned", "float v[4]; load_floats<4>(p.x + 1, v); p.y[threadIdx.x] = v[0];");
}

#[test]
fn shared_memory_without_a_barrier_between_warps() {
    caught(
        "no barrier between",
        "SHARED(float, tile, 64);\ntile[threadIdx.x] = 1.0f;\np.y[threadIdx.x] = tile[threadIdx.x / 2];",
    );
    caught(
        "write by warp",
        "SHARED(float, tile, 64);\ntile[threadIdx.x] = 1.0f;\n__syncthreads();\np.y[threadIdx.x] = tile[63 - threadIdx.x];\ntile[threadIdx.x] = 2.0f;",
    );
}

#[test]
fn an_asynchronous_copy_read_too_soon() {
    caught(
        "before cp.async's wait",
        "DYNAMIC_SHARED(float, tile);
         cp_async_16(tile + threadIdx.x * 4, p.x + threadIdx.x / 16 * 4, true);
         cp_async_commit();
         p.y[threadIdx.x] = tile[threadIdx.x * 4];",
    );
    // Waiting for all but the last group leaves the last one under way.
    caught(
        "before cp.async's wait",
        "DYNAMIC_SHARED(float, tile);
         cp_async_16(tile + threadIdx.x * 4, p.x + threadIdx.x / 16 * 4, true);
         cp_async_commit();
         cp_async_wait<1>();
         p.y[threadIdx.x] = tile[threadIdx.x * 4];",
    );
}

#[test]
fn a_freed_buffer() {
    let emulator = Emulator::new().unwrap();
    let x = emulator.allocate(64).unwrap().unwrap();
    emulator.free(x);
    assert!(emulator.upload(x, &[0; 4]).is_err());
    let source =
        "#include \"common.cuh\"\nstruct Params { Out<float> y; };\nKERNEL(kernel, Params, 32) { p.y[0] = 1.0f; }";
    let extents = Extents { grid: [1, 1, 1], threads: 32, shared: 0 };
    let error = emulator.launch_source(source, "kernel", extents, &x.to_le_bytes()).unwrap_err();
    assert!(error.to_string().contains("no buffer"), "{error}");
    let error = emulator.launch_source(source, "kernel", extents, &[0; 16]).unwrap_err();
    assert!(error.to_string().contains("bytes of parameters"), "{error}");
}
