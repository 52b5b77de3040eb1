//! The kernels of a step as one CUDA graph, so that the GPU goes from one to the next without the
//! driver: some 150 launches of a typical step are one. A graph is kept and started again with
//! what has changed of its kernels' arguments and grids.
//!
//! NOT YET RUN ON A GPU.

use std::{ffi::c_void, mem::MaybeUninit, ptr, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaFunction, DriverError,
    result::graph,
    sys::{self, CUDA_KERNEL_NODE_PARAMS, CUgraph, CUgraphExec, CUgraphNode, CUstream},
};

use super::Launch;

/// Graphs that are kept at most. A run needs two for each sequence of kernels that its slides take:
/// training and validation, and some more where a bag's size asks for other kernels.
const KEPT: usize = 16;

/// Those of a device, the one used last at the end.
#[derive(Default)]
pub(super) struct Graphs(Vec<Graph>);

impl Graphs {
    /// Starts kernels, one after another, which are `functions`.
    ///
    /// # Safety
    /// The launches must fit the kernels, and the stream be one of the context's.
    pub unsafe fn start(
        &mut self,
        context: &Arc<CudaContext>,
        stream: CUstream,
        launches: Vec<Launch>,
        functions: &[CudaFunction],
    ) -> Result<(), DriverError> {
        // Two of a sequence take turns, as a slide is prepared while the one before is worked on:
        // nothing of a graph that may run is touched.
        let mut same = self.0.iter().enumerate().filter(|(_, graph)| graph.holds(&launches)).map(|(i, _)| i);
        // SAFETY: the caller's.
        let graph = unsafe {
            match (same.next(), same.next()) {
                (Some(oldest), Some(_)) => {
                    let mut graph = self.0.remove(oldest);
                    graph.update(launches, functions)?;
                    graph
                }
                _ => Graph::new(context, launches, functions)?,
            }
        };
        // SAFETY: both are alive.
        unsafe { graph::launch(graph.exec, stream) }?;
        if self.0.len() == KEPT {
            self.0.remove(0);
        }
        self.0.push(graph);
        Ok(())
    }
}

/// A chain of kernels, ready to be started.
struct Graph {
    context: Arc<CudaContext>,
    graph: CUgraph,
    exec: CUgraphExec,
    /// One for each launch.
    nodes: Vec<CUgraphNode>,
    /// As they are in `exec`.
    launches: Vec<Launch>,
}

// SAFETY: handles of the driver, which are not bound to a thread.
unsafe impl Send for Graph {}

impl Graph {
    /// # Safety
    /// The launches must fit the kernels.
    unsafe fn new(
        context: &Arc<CudaContext>,
        launches: Vec<Launch>,
        functions: &[CudaFunction],
    ) -> Result<Self, DriverError> {
        let mut handle = MaybeUninit::uninit();
        // SAFETY: the call fills it in where it succeeds.
        let handle = unsafe { sys::cuGraphCreate(handle.as_mut_ptr(), 0).result().map(|()| handle.assume_init()) }?;
        // from here on dropping it destroys it
        let (context, exec) = (context.clone(), ptr::null_mut());
        let mut graph = Self { context, graph: handle, exec, nodes: Vec::new(), launches };
        for (launch, function) in graph.launches.iter().zip(functions) {
            let before = graph.nodes.last().map_or(&[][..], std::slice::from_ref);
            let mut node = MaybeUninit::uninit();
            with_parameters(launch, function, |parameters| {
                let (out, before, count) = (node.as_mut_ptr(), before.as_ptr(), before.len());
                // SAFETY: nodes of this graph; the driver copies the arguments, which fit the kernel.
                unsafe { sys::cuGraphAddKernelNode_v2(out, graph.graph, before, count, parameters) }.result()
            })?;
            // SAFETY: filled in by the call, which succeeded.
            graph.nodes.push(unsafe { node.assume_init() });
        }
        // SAFETY: the graph is alive.
        graph.exec = unsafe { graph::instantiate(graph.graph, sys::CUgraphInstantiate_flags(0)) }?;
        Ok(graph)
    }

    /// Whether these are its kernels, in its order.
    fn holds(&self, launches: &[Launch]) -> bool {
        let name = |launch: &Launch| (launch.kernel, launch.storage);
        self.launches.iter().map(name).eq(launches.iter().map(name))
    }

    /// # Safety
    /// The launches must fit the kernels, which are the graph's.
    unsafe fn update(&mut self, launches: Vec<Launch>, functions: &[CudaFunction]) -> Result<(), DriverError> {
        for (((old, new), &node), function) in self.launches.iter().zip(&launches).zip(&self.nodes).zip(functions) {
            if old != new {
                with_parameters(new, function, |parameters| {
                    // SAFETY: a node of the graph; the driver copies the arguments, which fit.
                    unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.exec, node, parameters) }.result()
                })?;
            }
        }
        self.launches = launches;
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The process may be going down with a broken device: nothing can be done about an error
        // here.
        let _ = self.context.bind_to_thread();
        if !self.exec.is_null() {
            // SAFETY: ours alone; the driver frees it when a start that is under way has ended.
            let _ = unsafe { graph::exec_destroy(self.exec) };
        }
        // SAFETY: as above.
        let _ = unsafe { graph::destroy(self.graph) };
    }
}

/// Hands over a launch as the driver takes it in a graph.
fn with_parameters<R>(launch: &Launch, function: &CudaFunction, work: impl FnOnce(&CUDA_KERNEL_NODE_PARAMS) -> R) -> R {
    let mut arguments = arguments(launch);
    let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
    work(&CUDA_KERNEL_NODE_PARAMS {
        func: function.cu_function(),
        gridDimX: gx,
        gridDimY: gy,
        gridDimZ: gz,
        blockDimX: bx,
        blockDimY: by,
        blockDimZ: bz,
        sharedMemBytes: launch.shared_bytes,
        kernelParams: arguments.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        ctx: ptr::null_mut(),
    })
}

/// Where each argument of a launch lies.
pub(super) fn arguments(launch: &Launch) -> Vec<*mut c_void> {
    launch.args.iter().map(|arg| arg.as_ptr().cast_mut().cast()).collect()
}
