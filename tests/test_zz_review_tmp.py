import functools, sys
sys.path.insert(0,'/work/main')
import pytest, torch
from tests.ranks import run_ranks
from tests.runs import assemble, config_of, train
from megatron_llm.data.stream import build_valid_streams
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import evaluate, train_step, RunState
from megatron_llm.data.stream import build_train_stream

def ev(config):
    grid=Grid.build(config.parallel, config.model.num_key_value_heads)
    e=build_engine(config,grid,torch.device('cpu'))
    s=build_train_stream(config); st=RunState(); out=[]
    for _ in range(2):
        out.append(evaluate(e, build_valid_streams(config)['synthetic']))
        r=train_step(e,s,st); out.append((r.loss,r.grad_norm))
    return out
def cmp(world, model, parallel, training=None):
    training={'steps':4,**(training or {})}
    c0=config_of(model=model, training={**training,'micro_batch_size':8})
    ((h,p),)=run_ranks(1,train,c0); w0=assemble([p])
    c=config_of(model=model,parallel=parallel,training=training)
    res=run_ranks(world,train,c)
    for hh,_ in res: assert [x[:2] for x in hh]==[pytest.approx(x[:2],rel=1e-9) for x in h]
    w=assemble([p for _,p in res])
    for n,v in w.items():
        assert (v-w0[n]).norm()<=1e-9*w0[n].norm()+1e-12*v.numel()**.5, n
    e0=run_ranks(1,ev,config_of(model=model,training={**training,'eval_rows':5}))[0]
    for e in run_ranks(world,ev,config_of(model=model,parallel=parallel,training={**training,'eval_rows':5})):
        assert e==[pytest.approx(x,rel=1e-9) for x in e0]
@pytest.mark.parametrize('tied',[True,False])
@pytest.mark.parametrize('world,model,parallel,training',[
 (8,{},{'pipeline_parallel':8},{}),
 (4,{'vocab_size':5},{'tensor_parallel':4},{}),
 (4,{'vocab_size':5},{'tensor_parallel':4,'sequence_parallel':False},{}),
 (8,{'vocab_size':5},{'tensor_parallel':4,'pipeline_parallel':2,'sequence_parallel':False},{'micro_batch_size':1}),
 (8,{'vocab_size':5},{'tensor_parallel':2,'pipeline_parallel':2,'bucket_size':1},{'micro_batch_size':1}),
 (4,{},{'bucket_size':1},{}),
 (4,{'num_hidden_layers':1},{'pipeline_parallel':2,'bucket_size':1},{'micro_batch_size':1}),
 (2,{},{'tensor_parallel':2},{'micro_batch_size':1,'sequence_length':6}),
 (8,{'num_hidden_layers':1,'num_key_value_heads':1},{'tensor_parallel':4,'pipeline_parallel':2,'sequence_parallel':False},{'micro_batch_size':1}),
 (8,{'num_hidden_layers':1,'num_key_value_heads':1},{'tensor_parallel':2,'pipeline_parallel':2,'sequence_parallel':True,'bucket_size':70},{'micro_batch_size':1}),
 (4,{'num_hidden_layers':2,'vocab_size':2000},{'pipeline_parallel':4},{'micro_batch_size':1}),
 (4,{'num_hidden_layers':1,'vocab_size':2000},{'tensor_parallel':2,'pipeline_parallel':2},{'micro_batch_size':2,'sequence_length':1}),
])
def test_x(world,model,parallel,training,tied):
    cmp(world,{**model,'tie_word_embeddings':tied},parallel,training)
